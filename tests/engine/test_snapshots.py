"""Prefix hits on models that keep states: in every way to a prefix the answer is that of a cold cache, and no snapshot is
left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from octavo.engine.engine import Engine
from octavo.engine.sequence import Sequence
from octavo.engine.params import SamplingParams
from octavo.models.bind import BoundModel, bind
from tests.engine.driving import drain, engine, run
from tests.models import zoo

MODELS = ("qwen3_5_text", "granitemoehybrid", "lfm2", "falcon_h1")
FORMATS = ("fp32", "kv8", "k8v4")
ANSWER = 12
NEAR = 1e-4  # of log-probabilities


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> BoundModel:
    hf = zoo.build(request.param)
    hf.config.get_text_config().max_position_embeddings = 2048
    return bind(hf)


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist()


def made(model: BoundModel, kv: str, snapshots: int = 12, **how: int) -> Engine:
    return engine(model, kv, **{"blocks": 60, "block_size": 64, "snapshots": snapshots} | how)


def ask(engine: Engine, *prompts: list[int]) -> list[Sequence]:
    found = run(engine, prompts, ANSWER, logprobs=1)
    engine.scheduler.check()
    assert not engine.pool.states.snapshots.held
    return found


def same(one: Sequence, other: Sequence) -> None:
    assert one.output == other.output
    assert [s.logprob for s in one.sampled] == pytest.approx([s.logprob for s in other.sampled], abs=NEAR)


@pytest.mark.parametrize("kv", FORMATS)
def test_a_hit_answers_as_a_cold_cache_at_every_depth(model: BoundModel, kv: str):
    """The next turn after the prompt, after the answer, and prompts that part within the first one."""
    first = text(300, 1)
    cached = made(model, kv)
    answer = ask(cached, first)[0]
    spoken = first + answer.output
    prompts = {
        "after the answer": (spoken + text(90, 2), 256),
        "beside the answer": (first + text(150, 3), 256),
        "at the prompt's middle": (first[:200] + text(150, 4), 0),  # no snapshot there, until now
        "at the prompt's middle, again": (first[:200] + text(150, 5), 192),
    }
    for name, (prompt, hit) in prompts.items():
        again = ask(cached, prompt)[0]
        assert again.prefix_hit == hit, name
        same(again, ask(made(model, kv, 0), prompt)[0])
