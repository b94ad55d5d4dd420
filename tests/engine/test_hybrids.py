"""Models whose layers are partly recurrent, through the whole engine: in every way to an answer the tokens are those of
transformers' own forward with its cache, and no slot of states is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel, bind
from tests.conftest import slow
from tests.engine.driving import drain, engine, interrupt, run, step
from tests.models import zoo
from tests.models.recurrent import ANSWER, NEAR, Answer, logprobs_of, own_answers, prompts

BLOCK = 16  # tokens; formats with edges have spans of 64
MODELS = ("qwen3_5_text", "lfm2", "falcon_h1", *slow("granitemoehybrid"))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> BoundModel:
    return bind(zoo.build(request.param))


@pytest.fixture(scope="module")
def wanted(model: BoundModel) -> list[Answer]:
    return own_answers(model.hf.config.model_type)


WAYS = {
    "together": {},
    "chunked": {"budget": 8, "batch": 4},
    "preempted": {"blocks": 40, "block_size": 4},
    "launched ahead": {"overlap": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_transformers_with_its_own_cache(model: BoundModel, wanted: list[Answer], way: str):
    """Tokens are equal and log-probabilities within 1e-4, whatever is computed beside, and in whatever chunks."""
    made = engine(model, "fp32", **WAYS[way])
    found = run(made, prompts(), ANSWER, logprobs=1)
    assert any(sequence.preemptions for sequence in found) == (way == "preempted")
    for sequence, (tokens, logprobs) in zip(found, wanted, strict=True):
        assert sequence.output == tokens
        assert logprobs_of(sequence) == pytest.approx(logprobs, abs=NEAR)


FORMATS = ("fp32", "kv4", *slow("kv8"))
CLOSE = {
    "fp32": NEAR,
    "kv8": 2e-2,
    "kv4": 1e-1,
}  # log-probabilities: a number that rounds otherwise may be another code
OTHER = {"beside seven others": {}, "preempted": {"blocks": 12, "batch": 8}} | {
    f"in chunks of {n}": {"budget": n, "batch": 1}
    for n in (16, 33, 15, 17, 31)  # around the edges of blocks
}


@pytest.fixture(scope="module", params=FORMATS)
def kv(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def cold(model: BoundModel, kv: str) -> list[Sequence]:
    """Each prompt alone."""
    return [run(engine(model, kv, block_size=BLOCK), [prompt], 8, logprobs=1)[0] for prompt in long_prompts()]


def long_prompts() -> list[list[int]]:
    """So long that codes are read between the raw rows at the edges."""
    return [70 * [5 + i] + prompt for i, prompt in enumerate(prompts())]


@pytest.mark.parametrize("way", [*list(OTHER)[:4], *slow(*list(OTHER)[4:])])
def test_other_ways_to_an_answer_in_every_format(model: BoundModel, kv: str, cold: list[Sequence], way: str):
    """The first answer is that of a cold run alone, up to rounding, whatever is computed in one step."""
    many = way in ("beside seven others", "preempted")
    found = run(engine(model, kv, block_size=BLOCK, **OTHER[way]), long_prompts()[: None if many else 1], 8, logprobs=1)
    assert any(sequence.preemptions for sequence in found) == (way == "preempted")
    for a, b in zip(cold, found, strict=False):
        for x, y in zip(a.sampled, b.sampled, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=CLOSE[kv])
            if x.token != y.token:  # as likely as the other
                break


def test_the_same_requests_again_are_equal_bit_for_bit(model: BoundModel):
    found = [run(engine(model, "kv8", budget=24), prompts(), 4, logprobs=2, temperature=1.0, seed=1) for _ in range(2)]
    assert [one.sampled for one in found[0]] == [one.sampled for one in found[1]]


@pytest.mark.slow
def test_ten_thousand_random_steps_leave_no_slot_behind(model: BoundModel, slowly: Callable[[int], int]):
    """Requests come, are aborted and preempted at random; every answer is its prompt's own, and all slots are free at
    the end."""
    chance = random.Random(0)
    asked = prompts()
    wanted = [run(engine(model, "fp32"), [prompt], ANSWER)[0].output for prompt in asked]
    made = engine(model, "fp32", blocks=24, block_size=4, batch=4, budget=16)
    live: list[tuple[int, Sequence]] = []
    for _ in range(slowly(10_000 // len(MODELS))):
        if chance.random() < 0.3:
            which = chance.randrange(len(asked))
            live.append((which, Sequence(asked[which], SamplingParams(max_tokens=chance.randint(1, ANSWER)))))
            made.add(live[-1][1])
        if live and chance.random() < 0.05:
            made.finish(chance.choice(live)[1])
        if made.busy:
            step(made)
        for which, sequence in [one for one in live if one[1].finished]:
            assert sequence.output == wanted[which][: len(sequence.output)]
            live.remove((which, sequence))
    drain(made)
    assert made.cache.states.used == 0


def test_a_slot_of_states_belongs_to_a_sequence_while_it_runs(model: BoundModel):
    """It is taken when the sequence starts, and free when it ends, by its length, an abort or a preemption."""
    made = engine(model, "fp32", batch=3)
    states = made.cache.states
    sequences = [Sequence(prompt, SamplingParams(max_tokens=6)) for prompt in prompts()[:4]]
    for sequence in sequences:
        made.add(sequence)
    made.step()
    assert states.used == 3
    assert sequences[3].state_slot is None
    made.finish(sequences[0])
    assert states.used == 2
    drain(made)
    assert states.used == 0


def test_a_step_that_fails_leaves_answers_as_they_were(
    model: BoundModel, wanted: list[Answer], monkeypatch: pytest.MonkeyPatch
):
    """States have gone on in a forward that does not end: what runs is computed again."""
    made = engine(model, "fp32")
    sequence = Sequence(prompts()[0], SamplingParams(max_tokens=ANSWER))
    made.add(sequence)
    for _ in range(3):
        made.step()
    interrupt(made, monkeypatch)
    assert made.scheduler.running == [sequence]  # until the next step begins: it may be ended as what has failed
    drain(made)
    assert sequence.output == wanted[0][0]
