"""The whole engine on the bundled model: a request's answer is its own, whatever happens around it, in every format."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from octavo.engine.engine import Engine
from octavo.engine.sampling import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from tests.engine.driving import FORMATS, drain, engine, run, step

LENGTHS = (5, 33, 64, 97, 150)  # 64 is whole blocks; the others end within one
SIZE = 16  # tokens of a block
TOKENS = 12  # of an answer
# Sums in another order differ in the last bit, which log-probabilities hardly show, unless a value lies so close to
# the border of two codes that it tips over. Few tokens see such a value, and one code is worth little. Attention to K
# and V that are not those stored would show in nearly all tokens, and more.
ROUNDING = 2e-5  # nats, a third of the tokens at least
TIPPED = {"fp32": 2e-5, "int8": 5e-3, "int8-token": 5e-3, "int4-token": 5e-2}  # nats, any token

Make = Callable[..., Engine]
Compare = Callable[[list[Sequence], list[Sequence]], None]


@pytest.fixture(scope="module")
def prompts(text_ids: list[int]) -> list[list[int]]:
    return [text_ids[400 * i : 400 * i + length] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=FORMATS)
def kv(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def make(kv: str, pamphlet: Model, calibration: Calibration) -> Make:
    """A new engine of the format under test."""
    return lambda **how: engine(pamphlet.bound, kv, calibration, **how)


@pytest.fixture(scope="module")
def cold(make: Make, prompts: list[list[int]]) -> list[Sequence]:
    """Each prompt in an engine of its own, its prompt in one piece."""
    return [ask(make(), [prompt])[0] for prompt in prompts]


def ask(engine: Engine, prompts: list[list[int]]) -> list[Sequence]:
    return run(engine, prompts, TOKENS, logprobs=0)


@pytest.fixture(scope="module")
def assert_same(kv: str) -> Compare:
    def compare(got: list[Sequence], expected: list[Sequence]) -> None:
        assert [sequence.output for sequence in got] == [sequence.output for sequence in expected]
        assert {sequence.finish_reason for sequence in got} == {"length"}
        ours, theirs = (torch.tensor([[s.logprob for s in x.sampled] for x in some]) for some in (got, expected))
        apart = (ours - theirs).abs()
        assert apart.max() <= TIPPED[kv]
        assert apart.quantile(1 / 3) <= ROUNDING

    return compare


# --- one answer, many ways to it -------------------------------------------------------------------------------------


def test_answers_differ_by_prompt_so_that_comparing_them_means_something(cold: list[Sequence]):
    assert len({tuple(sequence.output) for sequence in cold}) == len(cold)


def test_a_prefix_hit_answers_as_a_miss_and_is_counted_and_spares_the_last_token(
    make: Make, prompts: list[list[int]], cold: list[Sequence], assert_same: Compare
):
    warm = make()
    assert [sequence.prefix_hit for sequence in ask(warm, prompts)] == [0] * len(prompts)
    again = ask(warm, prompts)
    assert [sequence.prefix_hit for sequence in again] == [0, 32, 48, 96, 144]
    assert_same(again, cold)


def test_a_hit_on_another_prompt_of_the_same_beginning_answers_as_a_miss(
    make: Make, prompts: list[list[int]], cold: list[Sequence], assert_same: Compare
):
    warm = make()
    ask(warm, [[*prompt[: len(prompt) * 2 // 3], 7, 8, 9] for prompt in prompts])
    again = ask(warm, prompts)
    assert [sequence.prefix_hit for sequence in again] == [0, 16, 32, 64, 96]
    assert_same(again, cold)


def test_a_turn_that_continues_an_answer_finds_the_answer_too(
    make: Make, prompts: list[list[int]], assert_same: Compare
):
    """What decoding wrote is as good as what a prompt writes."""
    warm = make()
    continued = [sequence.tokens + sequence.tokens[:9] for sequence in ask(warm, prompts)]
    found = ask(warm, continued)
    assert [s.prefix_hit for s in found] == [(length + TOKENS - 1) // SIZE * SIZE for length in LENGTHS]
    assert_same(found, ask(make(hits=False), continued))


@pytest.mark.parametrize("budget", [1, 7])
def test_a_prompt_in_chunks_answers_as_one_in_a_piece(
    make: Make, prompts: list[list[int]], cold: list[Sequence], budget: int, assert_same: Compare
):
    chosen = [0, 1] if budget == 1 else [2, 3, 4]
    assert_same([ask(make(batch=1, budget=budget), [prompts[i]])[0] for i in chosen], [cold[i] for i in chosen])


def test_neighbours_of_other_lengths_change_nothing(
    make: Make, prompts: list[list[int]], cold: list[Sequence], assert_same: Compare
):
    assert_same(ask(make(), prompts), cold)
    assert_same(ask(make(budget=40, batch=4), prompts[::-1]), cold[::-1])


def test_neighbours_that_come_and_go_change_nothing(
    make: Make, prompts: list[list[int]], cold: list[Sequence], assert_same: Compare
):
    busy = make(budget=32)
    sequences = []
    for i, prompt in enumerate(prompts):
        sequences.append(Sequence(prompt, SamplingParams(max_tokens=TOKENS, logprobs=0)))
        busy.add(sequences[-1])
        passing = Sequence(prompts[-1 - i], SamplingParams(max_tokens=99))
        busy.add(passing)
        for _ in range(4):
            step(busy)
        busy.finish(passing)
        busy.scheduler.check()
    drain(busy)
    assert_same(sequences, cold)


@pytest.mark.parametrize("hits", [True, False])
def test_a_sequence_preempted_and_resumed_answers_as_an_undisturbed_one(
    make: Make, prompts: list[list[int]], cold: list[Sequence], hits: bool, assert_same: Compare
):
    small = make(blocks=15, budget=64, hits=hits)  # the first four prompts fit, and not a token more
    sequences = ask(small, prompts)
    assert sum(sequence.preemptions for sequence in sequences) >= 1
    assert_same(sequences, cold)


def test_everything_at_once_changes_nothing(
    make: Make, prompts: list[list[int]], cold: list[Sequence], assert_same: Compare
):
    """Little room, small steps, shared prefixes, twice over."""
    small = make(blocks=15, budget=41, batch=4)
    sequences = ask(small, prompts + prompts[::-1])
    assert sum(sequence.preemptions for sequence in sequences) >= 1
    assert sum(sequence.prefix_hit for sequence in sequences) >= SIZE
    assert_same(sequences, cold + cold[::-1])


# --- formats and models ----------------------------------------------------------------------------------------------


def test_formats_answer_alike_but_not_exactly(pamphlet: Model, calibration: Calibration, prompts: list[list[int]]):
    """If a format left no trace in the log-probabilities, it would not be in use."""
    logprobs = {}
    for kv in FORMATS:
        (sequence,) = run(engine(pamphlet.bound, kv, calibration), [prompts[-1]], 1, logprobs=0)
        logprobs[kv] = sequence.sampled[0].logprob
    for kv, least, most in (("int8", 1e-6, 0.05), ("int8-token", 1e-6, 0.05), ("int4-token", 1e-4, 0.5)):
        assert least < abs(logprobs[kv] - logprobs["fp32"]) < most, kv


def test_two_engines_of_different_formats_share_a_model_step_by_step(
    pamphlet: Model, calibration: Calibration, prompts: list[list[int]]
):
    alone = {kv: run(engine(pamphlet.bound, kv, calibration), prompts, TOKENS) for kv in FORMATS}
    together = {kv: engine(pamphlet.bound, kv, calibration) for kv in FORMATS}
    sequences = {kv: [Sequence(prompt, SamplingParams(max_tokens=TOKENS)) for prompt in prompts] for kv in FORMATS}
    for kv in FORMATS:
        for sequence in sequences[kv]:
            together[kv].add(sequence)
    while any(one.busy for one in together.values()):
        for one in together.values():
            if one.busy:
                step(one)
    for kv in FORMATS:
        assert [s.output for s in sequences[kv]] == [s.output for s in alone[kv]], kv


# --- the pool --------------------------------------------------------------------------------------------------------


def test_clearing_the_prefixes_makes_the_next_request_a_cold_one(pamphlet: Model, prompts: list[list[int]]):
    warm = engine(pamphlet.bound)
    first, second = run(warm, [prompts[2]]), run(warm, [prompts[2]])
    warm.pool.clear()
    third = run(warm, [prompts[2]])
    assert [s[0].prefix_hit for s in (first, second, third)] == [0, 48, 0]
    assert first[0].output == second[0].output == third[0].output


def test_the_context_is_the_shortest_of_the_models_the_sessions_and_the_caches(pamphlet: Model):
    bound = pamphlet.bound
    assert engine(bound, blocks=200, block_size=16).scheduler.max_context == 2048
    assert engine(bound, blocks=200, block_size=16, context=99).scheduler.max_context == 99
    assert engine(bound, blocks=200, block_size=16, context=9999).scheduler.max_context == 2048
    assert engine(bound, blocks=3, block_size=16, context=99).scheduler.max_context == 48


def test_a_step_that_fails_leaves_sequences_that_can_be_ended(
    pamphlet: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    broken = engine(pamphlet.bound)
    sequence = Sequence(prompts[1])
    broken.add(sequence)
    with monkeypatch.context() as patch:
        patch.setattr(broken.runner, "run", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            broken.step()
    broken.finish(sequence)
    broken.scheduler.check()
    assert len(broken.pool.free) == len(broken.pool)
    assert run(broken, [prompts[1]])[0].output == run(engine(pamphlet.bound), [prompts[1]])[0].output


@pytest.mark.parametrize(("kv", "seed"), [("fp32", 0), ("fp32", 1), ("int8", 2), ("int8-token", 3), ("int4-token", 4)])
def test_random_requests_and_aborts_leave_answers_and_pool_as_they_should_be(
    llama: BoundModel, llama_calibration: Calibration, kv: str, seed: int
):
    draw = random.Random(seed)
    stems = [[draw.randrange(64) for _ in range(40)] for _ in range(4)]
    crowded = engine(llama, kv, llama_calibration, blocks=30, block_size=4, batch=6, budget=24)
    everyone: list[Sequence] = []
    for _ in range(80):
        if draw.random() < 0.4:
            stem = draw.choice(stems)
            prompt = stem[: draw.randint(1, 40)] + [draw.randrange(64) for _ in range(draw.randint(0, 4))]
            everyone.append(Sequence(prompt, SamplingParams(max_tokens=draw.randint(1, 20))))
            crowded.add(everyone[-1])
        if everyone and draw.random() < 0.1:
            crowded.finish(draw.choice(everyone))
            crowded.scheduler.check()
        if crowded.busy:
            step(crowded)
    drain(crowded)

    assert any(sequence.preemptions for sequence in everyone)
    assert any(sequence.prefix_hit for sequence in everyone)
    assert any(sequence.finish_reason == "abort" for sequence in everyone)
    for sequence in everyone:
        max_tokens = sequence.params.max_tokens
        (alone,) = run(engine(llama, kv, llama_calibration, block_size=4, hits=False), [sequence.prompt], max_tokens)
        assert sequence.output == alone.output[: len(sequence.output)]
        assert sequence.finish_reason == ("length" if len(sequence.output) == max_tokens else "abort")
