"""What the guide's table "What is equal" says, line by line, in float32 and bf16: bit for bit, or up to rounding.

That equal logits give equal tokens in any company, ties by token id, is shown in test_sampling.py.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel, bind
from tests.engine.driving import drain, engine

# Of log-probabilities of this model, whose logits go up to 20: what sums in another order may change.
NEAR = {torch.float32: 3e-4, torch.bfloat16: 0.5}
LIKELY = -8  # those below are not compared: what they differ by decides nothing
KINDS = [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.8, "top_k": 9}, {}]  # greedy and seeded
WAYS = {
    "prefix hit": {},
    "chunked": {"budget": 8, "batch": 4},
    "preempted": {"blocks": 16},
    "in company": {},
    "launched ahead": {"overlap": True},
}


@pytest.fixture(scope="module", params=NEAR, ids=str)
def model(llama: BoundModel, request: pytest.FixtureRequest) -> BoundModel:
    return bind(deepcopy(llama.hf).to(request.param))


@pytest.fixture(scope="module", params=["raw", "int8-token"])
def kv(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(model: BoundModel, kv: str) -> list[Sequence]:
    return answers(model, kv, None)


def answers(model: BoundModel, kv: str, way: str | None) -> list[Sequence]:
    """Each request alone and cold, or in a way that may make no difference but rounding."""
    kv = str(model.raw_format) if kv == "raw" else kv
    made = engine(model, kv, block_size=4, **WAYS.get(way or "", {}))
    found = [
        Sequence(
            [(7 * i + 3 * j * j) % 64 for j in range(20 + 5 * i)],
            SamplingParams(max_tokens=10, logprobs=64, seed=i, **kind),
        )
        for i, kind in enumerate(KINDS)
    ]
    for sequence in found:
        if way == "prefix hit":
            made.add(Sequence(sequence.tokens[:-5], SamplingParams(max_tokens=1)))
            drain(made)
        made.add(sequence)
        if way in (None, "prefix hit"):
            drain(made)
    drain(made)
    assert any(s.preemptions for s in found) == (way == "preempted")
    assert all(s.prefix_hit > 0 for s in found) == (way == "prefix hit")
    return found


def test_the_same_requests_again_are_equal_bit_for_bit(model: BoundModel, kv: str, alone: list[Sequence]):
    assert [s.sampled for s in answers(model, kv, None)] == [s.sampled for s in alone]


@pytest.mark.parametrize("way", WAYS)
def test_another_way_to_the_same_answer_is_equal_up_to_rounding(
    model: BoundModel, kv: str, alone: list[Sequence], way: str
):
    """The distributions agree for as long as the tokens do, and where they first differ; greedily they differ only
    between tokens that are as near as that."""
    for a, b in zip(alone, answers(model, kv, way), strict=True):
        for x, y in zip(a.sampled, b.sampled, strict=True):
            gap = max(abs(p - y.top[token]) for token, p in x.top.items() if p > LIKELY)
            assert gap <= NEAR[model.dtype]
            if x.token != y.token:
                assert a.params.temperature or abs(x.top[x.token] - x.top[y.token]) <= 2 * NEAR[model.dtype]
                break
