"""Prefix hits on models that keep states: in every way to a prefix the answer is that of a cold cache, and no snapshot
is left behind."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from octavo.attention import cpu
from octavo.engine.engine import Engine
from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel, bind
from tests.conftest import slow
from tests.engine.driving import drain, engine, interrupt, run, step
from tests.models import zoo
from tests.models.recurrent import served

MODELS = ("qwen3_5_text", "lfm2", *slow("falcon_h1", "granitemoehybrid"))
FORMATS = ("fp32", "k8v4", *slow("kv8", "kv4"))
ANSWER = 8
NEAR = 1e-4  # of log-probabilities


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> BoundModel:
    return bind(zoo.build(request.param, max_position_embeddings=2048))


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist()


def made(model: BoundModel, kv: str = "fp32", snapshots: int = 12, **how: Any) -> Engine:
    return engine(model, kv, **{"blocks": 60, "block_size": 64, "snapshots": snapshots} | how)


def ask(engine: Engine, *prompts: list[int], answer: int = ANSWER) -> list[Sequence]:
    found = run(engine, prompts, answer, logprobs=1)
    expect_nothing_held(engine)
    return found


def expect_nothing_held(engine: Engine) -> None:
    states = engine.pool.states
    assert (states.slots.used, states.snapshots.held, states.coming) == (0, 0, {})


def expect_same(found: list[Sequence], cold: list[Sequence], near: float = NEAR) -> None:
    for one, other in zip(found, cold, strict=True):
        assert one.output == other.output
        assert [s.logprob for s in one.sampled] == pytest.approx([s.logprob for s in other.sampled], abs=near)


@pytest.mark.parametrize("kv", FORMATS)
def test_a_hit_answers_as_a_cold_cache_at_every_depth(model: BoundModel, kv: str):
    """The next turn after the prompt and after the answer, and prompts that part within the first one; alone and beside
    seven others."""
    first = text(300, 1)
    cached, cold = made(model, kv), made(model, kv, 0)
    spoken = first + ask(cached, first, answer=22)[0].output
    prompts = {
        "after the answer": (spoken + text(90, 2), 320),
        "after the prompt": (first + text(150, 3), 256),
        "within the prompt": (first[:200] + text(150, 4), 0),  # no snapshot there, until now
        "within the prompt, again": (first[:200] + text(150, 5), 192),
    }
    for name, (prompt, hit) in prompts.items():
        again = ask(cached, prompt)
        assert again[0].prefix_hit == hit, name
        expect_same(again, ask(cold, prompt))
    others = [text(length, 6 + length) for length in (40, 64, 65, 129, 200, 257, 30)]
    together = ask(cached, spoken + text(33, 7), *others)
    assert together[0].prefix_hit == 320
    expect_same(together, ask(cold, spoken + text(33, 7), *others))


@pytest.mark.parametrize("kv", ["kv8", *slow("fp32")])
def test_the_preempted_go_on_from_their_last_snapshots(model: BoundModel, kv: str):
    """A cache that is too small for both: the later one is put back, and answers as if it had not been."""
    prompts = [text(200, 1), text(200, 2)]
    small = made(model, kv, blocks=8, batch=2)
    restarts: list[int] = []
    start = small.pool.start

    def noted(sequence: Sequence, hit: object) -> None:
        start(sequence, hit)  # type: ignore[arg-type]
        if sequence.preemptions:
            restarts.append(sequence.num_cached)

    small.pool.start = noted  # type: ignore[method-assign]
    found = ask(small, *prompts, answer=80)
    assert restarts == [192]
    expect_same(found, ask(made(model, kv, 0), *prompts, answer=80))


def test_with_steps_launched_ahead_a_snapshot_is_of_the_tokens_it_is_found_by(model: BoundModel):
    """On a GPU the next step is launched before the last one's tokens are known; decode steps are padded in buffers."""
    ahead, cold = made(model, block_size=16, overlap=True), made(model, snapshots=0, block_size=16)
    memory = list(ahead.cache.states.memory.values())
    addresses, others = [x.data_ptr() for x in memory], slice(3, ahead.cache.states.slots)  # those of nobody here
    before = [x[others].clone() for x in memory]
    prompt = text(150, 1)
    spoken = prompt + ask(ahead, prompt, text(20, 3), text(30, 4), answer=40)[0].output
    assert [x.data_ptr() for x in ahead.cache.states.memory.values()] == addresses, "graphs read where states were"
    assert all(torch.equal(x[others], y) for x, y in zip(memory, before, strict=True)), "padding wrote a slot"
    again = ask(ahead, spoken + text(20, 2))
    assert again[0].prefix_hit == 176
    expect_same(again, ask(cold, spoken + text(20, 2)))


def test_a_beginning_that_requests_share_is_computed_once(model: BoundModel):
    """Those that come at a time wait for the first, which takes a snapshot where they part."""
    system = text(200, 1)
    prompts = [system + text(60, seed) for seed in (2, 3, 4)]
    cached = made(model)
    found = ask(cached, *prompts)
    assert [one.prefix_hit for one in found] == [0, 192, 192]
    assert cached.pool.states.computed_again == 0
    expect_same(found, ask(made(model, snapshots=0), *prompts))


def test_without_room_for_snapshots_every_prompt_is_computed_whole(model: BoundModel):
    """And what was cached but for its states is counted."""
    none = made(model, snapshots=0)
    assert [ask(none, text(200, 1))[0].prefix_hit for _ in range(2)] == [0, 0]
    assert none.pool.states.computed_again == 192


def test_a_step_that_fails_goes_on_from_the_last_snapshot(model: BoundModel, monkeypatch: pytest.MonkeyPatch):
    """States have gone on in a forward that does not end: what runs goes back to where they are known."""
    failing = made(model)
    sequence = Sequence(text(200, 1), SamplingParams(max_tokens=ANSWER, logprobs=1))
    failing.add(sequence)
    for _ in range(4):
        step(failing)
    interrupt(failing, monkeypatch)
    step(failing)
    assert sequence.num_cached > 192, "it was not computed from its beginning"
    drain(failing)
    expect_nothing_held(failing)
    expect_same([sequence], ask(made(model, snapshots=0), text(200, 1)))


@pytest.mark.slow
def test_no_slot_and_no_snapshot_leaks_in_ten_thousand_steps(model: BoundModel, slowly: Callable[[int], int]):
    """Conversations that go on, are edited and end early, small requests, aborts and failed steps, in a cache that is
    too small. Every step is checked; in the end every answer is what a cold cache gives, bit for bit where sums do not
    depend on the company: elsewhere a number that rounds otherwise may be another code."""
    chosen, native = Random(0), served(model.hf.config.model_type)
    busy = made(native, "kv8", snapshots=5, blocks=20, batch=4, budget=200, layout=cpu.BACKEND.layout)
    histories = [text(chosen.randrange(20, 200), seed) for seed in range(4)]
    asked: list[Sequence] = []
    for count in range(slowly(2500)):
        if len(busy.scheduler.waiting) < 2 and chosen.random() < 0.2:
            at = chosen.randrange(len(histories))
            history = histories[at]
            if len(history) > 500 or chosen.random() < 0.1:
                history = history[: chosen.randrange(1, len(history))]
            histories[at] = history + text(chosen.randrange(1, 60), count)
            prompt = histories[at] if chosen.random() < 0.6 else text(chosen.randrange(1, 150), count)
            asked.append(Sequence(prompt, SamplingParams(max_tokens=chosen.randrange(1, 60), logprobs=1)))
            busy.add(asked[-1])
        if asked and chosen.random() < 0.02:
            busy.finish(chosen.choice(asked))
        if chosen.random() < 0.01:
            busy.scheduler.restart()
        if busy.busy:
            step(busy)
    drain(busy)
    expect_nothing_held(busy)
    cold = made(native, "kv8", snapshots=0, layout=cpu.BACKEND.layout)
    for sequence in asked[:: max(1, len(asked) // 100)]:
        if sequence.output and sequence.finish_reason != "abort":
            again = Sequence(
                sequence.tokens[: sequence.num_prompt], SamplingParams(max_tokens=len(sequence.output), logprobs=1)
            )
            cold.add(again)
            drain(cold)
            expect_same([sequence], [again], 0.0 if cpu.exact else 1e-2)
