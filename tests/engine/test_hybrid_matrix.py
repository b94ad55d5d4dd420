"""Four hybrids through the engine, by the native kernels: every format, in every way to an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from octavo.attention import cpu
from octavo.cache import session
from octavo.cache.session import Identity, SavedSession
from octavo.engine.engine import Engine
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel
from octavo.quant.calibration import SYNTHETIC, Calibration
from tests.conftest import observe
from tests.engine.driving import engine, run
from tests.models import zoo
from tests.models.recurrent import SIZED, served

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")

FORMATS = ("fp32", "bf16", "int8", "int8-token", "int4-token", "kv8", "k8v4", "kv4")
BLOCK = 64
ANSWER = 16
LENGTHS = (185, 150, 65, 64, 63, 30, 7, 1)  # tokens of the prompts; the first answer goes over the edge of a block
# Of log-probabilities where sums depend on the company: a value that then lies between two codes may get the other one.
NEAR = 0.0 if cpu.exact else 2e-1


@pytest.fixture(scope="module", params=SIZED)
def model(request: pytest.FixtureRequest) -> BoundModel:
    return served(request.param)


def text(length: int, seed: int) -> list[int]:
    return torch.randint(3, zoo.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [text(length, seed) for seed, length in enumerate(LENGTHS)]
Make = Callable[..., Engine]


def answers(made: Engine, *prompts: list[int]) -> list[Sequence]:
    found = run(made, prompts, ANSWER, logprobs=1)
    assert made.cache.states.used == 0
    return found


def cold(make: Make, _: Path) -> list[Sequence]:
    return [answers(make(hits=False), prompt)[0] for prompt in PROMPTS[:2]]


def prefix_hit(make: Make, _: Path) -> list[Sequence]:
    made = make()
    answers(made, *PROMPTS[:2])
    found = [answers(made, prompt)[0] for prompt in PROMPTS[:2]]
    assert [one.prefix_hit for one in found] == [128, 128]
    return found


def preempted(make: Make, _: Path) -> list[Sequence]:
    found = answers(make(blocks=6, batch=2), *PROMPTS[:2])
    assert any(one.preemptions for one in found)
    return found


def restored(make: Make, path: Path) -> list[Sequence]:
    made, back, prompt = make(), make(), PROMPTS[0]
    answers(made, prompt)
    identity = Identity.of(made.cache, "the test", made.runner.model.arithmetic)
    rows = session.to_rows(made.cache, session.copy_prefix(made.cache, made.pool, prompt))
    session.save(path / "saved", prompt, rows, identity)
    saved = SavedSession.open(path / "saved")
    session.paste_prefix(back.cache, back.pool, saved.tokens, session.to_blocks(back.cache, saved.codes(back.cache)))
    found = answers(back, prompt)
    assert found[0].prefix_hit == 128
    return found


def beside_seven_others(make: Make, _: Path) -> list[Sequence]:
    return answers(make(), *PROMPTS)


def in_chunks_of(tokens: int) -> Callable[[Make, Path], list[Sequence]]:
    return lambda make, _: [answers(make(hits=False, batch=1, budget=tokens), prompt)[0] for prompt in PROMPTS[:2]]


WAYS = {
    "prefix hit": prefix_hit,
    "preempted": preempted,
    "restored from a file": restored,
    "beside seven others": beside_seven_others,
    **{f"in chunks of {tokens}": in_chunks_of(tokens) for tokens in range(BLOCK - 3, BLOCK + 4)},
}


@pytest.mark.slow
def test_every_format_in_every_way_to_an_answer(model: BoundModel, tmp_path: Path, slowly: Callable[[int], int]):
    """The answers are those of a cold cache, each prompt alone: tokens and log-probabilities, bit for bit where the
    processor has no unit whose sums depend on the company."""
    pairs = [(kv, way) for kv in FORMATS for way in WAYS]
    chosen = Random(model.hf.config.model_type).sample(pairs, slowly(len(pairs)))
    calibration = observe(model, text(200, 9), SYNTHETIC)
    for kv in FORMATS:
        ways = [way for other, way in chosen if other == kv]
        wanted = cold(makes(model, kv, calibration), tmp_path) if ways else []
        for way in ways:
            found = WAYS[way](makes(model, kv, calibration), tmp_path)
            for one, other in zip(found, wanted, strict=False):
                expect_same(one, other, f"{kv}, {way}")


def makes(model: BoundModel, kv: str, calibration: Calibration) -> Make:
    def make(**how: Any) -> Engine:
        return engine(model, kv, calibration, layout=cpu.BACKEND.layout, **{"snapshots": 6, "blocks": 40} | how)

    return make


def expect_same(one: Sequence, other: Sequence, what: str) -> None:
    for x, y in zip(one.sampled, other.sampled, strict=True):
        assert x.logprob == pytest.approx(y.logprob, abs=NEAR, rel=0), what
        if x.token != y.token and NEAR:  # as likely as the other
            break
        assert x.token == y.token, what
