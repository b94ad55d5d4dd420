"""Steps launched before the one before them is taken in: the same tokens, and nothing left behind."""

from __future__ import annotations

import pytest

from octavo.engine.params import SamplingParams
from octavo.engine.sampling import Choice
from octavo.engine.sequence import Sampled, Sequence
from octavo.models.bind import BoundModel
from tests.engine.driving import drain, engine, step

PROMPTS = [[7, 3, 9], [5] * 6, list(range(1, 12)), [60, 2]]


def answers(llama: BoundModel, overlap: bool, stop_ids: frozenset[int] = frozenset(), **params) -> list[Sequence]:
    one = engine(llama, block_size=4, overlap=overlap)
    found = [Sequence(prompt, SamplingParams(max_tokens=20, **params), stop_ids) for prompt in PROMPTS]
    for sequence in found:
        one.add(sequence)
    drain(one)
    return found


KINDS = [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.4}, {"logprobs": 2}]


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_tokens_are_those_of_the_engine_that_waits(llama: BoundModel, params: dict):
    waits, overlaps = answers(llama, False, **params), answers(llama, True, **params)
    assert [s.output for s in overlaps] == [s.output for s in waits]
    assert [s.finish_reason for s in overlaps] == ["length"] * len(PROMPTS)


def test_a_token_that_ends_an_answer_ends_it_though_the_next_step_is_under_way(llama: BoundModel):
    stops = frozenset({s.output[5 + i] for i, s in enumerate(answers(llama, False))})
    waits, overlaps = answers(llama, False, stops), answers(llama, True, stops)
    assert [s.output for s in overlaps] == [s.output for s in waits]
    assert "stop" in {s.finish_reason for s in overlaps}


def test_a_step_that_is_interrupted_while_it_waits_for_its_tokens_loses_none(
    llama: BoundModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = answers(llama, False)
    read, left = Choice.read, [3]

    def interrupted(choice: Choice) -> list[Sampled]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return read(choice)

    one = engine(llama, block_size=4, overlap=True)
    found = [Sequence(prompt, SamplingParams(max_tokens=20)) for prompt in PROMPTS]
    for sequence in found:
        one.add(sequence)
    monkeypatch.setattr(Choice, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drain(one)
    assert one.busy
    drain(one)
    assert [s.output for s in found] == [s.output for s in waits]


def test_a_decode_step_is_launched_before_the_one_before_it_is_read(llama: BoundModel):
    one = engine(llama, overlap=True)
    sequence = Sequence(PROMPTS[0], SamplingParams(max_tokens=20))
    one.add(sequence)
    step(one)
    launched = one.launched
    assert len(sequence.output) == 1
    assert launched.choice.read()[0].token not in (None, -1)
    assert step(one) == [sequence]
    assert sequence.output[1] == launched.choice.read()[0].token
    assert one.launched is not launched


def test_who_draws_by_what_was_said_waits_for_it(llama: BoundModel):
    one = engine(llama, overlap=True)
    one.add(Sequence(PROMPTS[0], SamplingParams(max_tokens=20, repetition_penalty=1.2)))
    step(one)
    assert one.launched is None


def test_an_aborted_sequence_gains_nothing_from_the_step_under_way_and_newcomers_take_its_blocks(llama: BoundModel):
    one = engine(llama, blocks=6, block_size=4, batch=2, overlap=True)
    aborted = Sequence(list(range(1, 12)), SamplingParams(max_tokens=12))
    one.add(aborted)
    for _ in range(3):
        step(one)
    said = list(aborted.output)
    one.finish(aborted)
    one.scheduler.check()
    newcomer = Sequence(list(range(20, 32)), SamplingParams(max_tokens=12))
    one.add(newcomer)
    drain(one)
    assert aborted.output == said
    alone = Sequence(newcomer.prompt, newcomer.params)
    fresh = engine(llama, block_size=4)
    fresh.add(alone)
    drain(fresh)
    assert newcomer.output == alone.output


def test_a_newcomer_waits_for_one_step_and_no_longer(llama: BoundModel):
    one = engine(llama, overlap=True)
    one.add(Sequence(PROMPTS[0], SamplingParams(max_tokens=30)))
    for _ in range(3):
        step(one)
    newcomer = Sequence(PROMPTS[1], SamplingParams(max_tokens=3))
    one.add(newcomer)
    step(one)  # launched before it came
    assert newcomer in step(one)


def test_who_waits_for_blocks_does_not_keep_the_others_from_running_ahead(llama: BoundModel):
    one = engine(llama, blocks=4, block_size=4, overlap=True)
    running, waiting = (Sequence(prompt, SamplingParams(max_tokens=4)) for prompt in ([1] * 9, [2] * 9))
    one.add(running)
    one.add(waiting)
    step(one)
    assert one.scheduler.running == [running]
    assert one.launched is not None
    drain(one)
    assert len(running.output) == len(waiting.output) == 4
