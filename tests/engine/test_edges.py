"""The engine with edges: the same tokens however the work is cut, and no raw page leaked."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.cache import session
from octavo.cache.layout import Layout
from octavo.cache.plan import plan_layers
from octavo.cache.session import Identity, SavedSession
from octavo.cache.size import CacheSize
from octavo.cache.store import KVCache
from octavo.engine.engine import Engine
from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel
from octavo.quant.format import KVFormat
from tests.conftest import slow
from tests.engine.driving import drain, interrupt, run, step

SIZE = 16
SPANS = [SIZE, 4 * SIZE, *slow(2 * SIZE)]


def engine(
    bound: BoundModel, span: int, batch: int = 4, blocks: int = 64, budget: int = 1024, **more: object
) -> Engine:
    format = replace(KVFormat.parse("int8-token"), edges=span)
    plans = plan_layers(bound.shapes, format)
    pages = CacheSize.of(bound.shapes, plans[0].format, SIZE).raw_pages(batch)
    cache = KVCache(plans, blocks, Layout(SIZE), pages)
    made = Engine(bound, cache, batch, budget, **more)  # type: ignore[arg-type]
    if made.overlap:
        made.runner.capture(batch, made.scheduler.max_context, how=lambda run: run)
    return made


def prompt(bound: BoundModel, length: int, seed: int = 0) -> list[int]:
    return torch.randint(bound.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(sequences: list[Sequence]) -> list[list[int]]:
    return [sequence.output for sequence in sequences]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("length", [10, 64, 100])
def test_a_prompt_in_chunks_or_found_in_the_cache_answers_as_a_cold_one(
    llama: BoundModel, span: int, length: int
) -> None:
    text = prompt(llama, length)
    cold = answers(run(engine(llama, span), [text]))
    for budget in (7, 33):
        assert answers(run(engine(llama, span, budget=budget), [text])) == cold
    warm = engine(llama, span)
    run(warm, [text])
    [again] = run(warm, [text])
    assert again.output == cold[0]
    assert again.prefix_hit == (length - 1) // span * span


@pytest.mark.parametrize(("span", "steps"), [(SIZE, 2), (4 * SIZE, 3)])
def test_a_chunk_that_was_interrupted_finds_the_raw_rows_that_it_had_overwritten(
    llama: BoundModel, span: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, made = prompt(llama, 150), engine(llama, span, budget=33)
    sequence = Sequence(text, SamplingParams(max_tokens=24))
    made.add(sequence)
    for _ in range(steps):
        step(made)
    interrupt(made, monkeypatch)
    drain(made)
    assert [sequence.output] == answers(run(engine(llama, span), [text]))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("budget", [7, 1024])
def test_a_first_page_that_is_gone_is_computed_and_the_rest_of_the_prefix_is_found(
    llama: BoundModel, span: int, budget: int
) -> None:
    text, made = prompt(llama, 100), engine(llama, span, budget=budget)
    cold = answers(run(made, [text]))
    assert made.pool.edges is not None
    made.pool.edges.firsts.clear()
    whole = 99 // span * span
    for expected in (whole - SIZE, whole):
        [found] = run(made, [text])
        assert (found.prefix_hit, found.output) == (expected, cold[0])


def test_more_beginnings_than_there_are_first_pages_are_found(llama: BoundModel) -> None:
    made = engine(llama, SIZE, batch=1)
    texts = [prompt(llama, 40, seed) for seed in range(8)]
    cold = [answers(run(made, [text])) for text in texts]
    for text, expected in zip(texts, cold, strict=True):
        [found] = run(made, [text])
        assert (found.prefix_hit, [found.output]) == (SIZE, expected)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("overlap", [False, True])
def test_sequences_that_run_out_of_blocks_are_preempted_and_answer_the_same(
    llama: BoundModel, span: int, overlap: bool
) -> None:
    texts = [prompt(llama, length, seed) for seed, length in enumerate((70, 20, 45, 90))]
    alone = [answers(run(engine(llama, span), [text], 40))[0] for text in texts]
    crowded = run(engine(llama, span, blocks=14, overlap=overlap), texts, 40)
    assert answers(crowded) == alone
    assert any(sequence.preemptions for sequence in crowded)


@pytest.mark.parametrize("span", SPANS)
def test_a_session_restored_from_its_file_goes_on_as_the_one_that_stayed(
    llama: BoundModel, span: int, tmp_path: Path
) -> None:
    text = prompt(llama, 150)
    stayed = engine(llama, span)
    run(stayed, [text[:140]], 1)
    copies = session.copy_prefix(stayed.cache, stayed.pool, text)
    identity = Identity.of(stayed.cache, "weights", "float32")
    session.save(tmp_path / "file", text, session.to_rows(stayed.cache, copies), identity)
    there = engine(llama, span)
    codes = SavedSession.open(tmp_path / "file").codes(there.cache)
    session.paste_prefix(there.cache, there.pool, text, session.to_blocks(there.cache, codes))
    there.scheduler.check()
    [restored], [kept] = run(there, [text]), run(stayed, [text])
    assert restored.prefix_hit == kept.prefix_hit == 139 // span * span
    assert restored.output == kept.output == answers(run(engine(llama, span), [text]))[0]


def test_cached_conversations_keep_their_first_page_up_to_the_spare_ones(llama: BoundModel) -> None:
    made = engine(llama, SIZE, batch=1)
    texts = [prompt(llama, 40, seed) for seed in range(6)]
    for text in texts:
        run(made, [text], 2)
    assert [bool(made.pool.find(text)) for text in texts] == [False, True, True, True, True, True]


@pytest.mark.parametrize("span", SPANS)
def test_random_steps_leak_no_raw_page(llama: BoundModel, span: int) -> None:
    take_random_steps(llama, span, 200)


@pytest.mark.parametrize("span", slow(SIZE, 2 * SIZE, 4 * SIZE))
def test_many_random_steps_leak_no_raw_page(llama: BoundModel, span: int, slowly: Callable[[int], int]) -> None:
    take_random_steps(llama, span, slowly(100_000))


def take_random_steps(llama: BoundModel, span: int, steps: int) -> None:
    """Requests come, share beginnings, are aborted and preempted; the pools are checked after every step."""
    dice, made = random.Random(span), engine(llama, span, blocks=20, budget=40)
    beginnings = [prompt(llama, 50, seed) for seed in range(3)]
    alive: list[Sequence] = []
    for _ in range(steps):
        if dice.random() < 0.3 and len(alive) < 8:
            text = dice.choice(beginnings)[: dice.randint(1, 50)] + prompt(
                llama, dice.randint(1, 30), dice.randrange(99)
            )
            sequence = Sequence(text, SamplingParams(max_tokens=dice.randint(1, 30)))
            made.add(sequence)
            alive.append(sequence)
        if alive and dice.random() < 0.1:
            made.finish(dice.choice(alive))
            made.scheduler.check()
        if made.busy:
            step(made)
        if dice.random() < 0.02:
            made.pool.clear()
        alive = [sequence for sequence in alive if not sequence.finished]
    drain(made)
    assert made.pool.edges is not None
    assert len(made.pool.edges.firsts.free) == len(made.pool.edges.firsts)
    assert len(made.pool.edges.rings.free) == len(made.pool.edges.rings)
