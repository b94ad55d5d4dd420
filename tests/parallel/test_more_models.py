"""Two ranks answer as one on the bundled model, four with one KV head for all of them, and two under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo.engine.params import SamplingParams
from octavo.llm import LLM
from octavo.models.packed import packed_layers
from octavo.quant.calibration import Calibration
from tests.conftest import observe
from tests.parallel.models import FORMATS, alone, assert_same_answers, divided, packed_mixture, tiny

pytestmark = pytest.mark.slow


def test_two_ranks_answer_as_one_on_pamphlet(
    calibration: Calibration, text_ids: list[int], slowly: Callable[[int], int]
):
    one = alone(None)
    with divided(None) as two:
        for kv in FORMATS[: slowly(len(FORMATS))]:
            assert_same_answers(one, two, calibration, kv, text_ids)


def test_four_ranks_with_one_kv_head_for_all_answer_as_one(tmp_path: Path, slowly: Callable[[int], int]):
    one = alone(tiny(tmp_path, 1))
    calibration = observe(one.bound, one.bound.random_tokens(200), one.fingerprint)
    with divided(one.path, 4) as four:
        assert [(share.starts, share.total) for share in four.bound.shares] == [((0,) * 4, 1)] * 2  # type: ignore[attr-defined]
        for kv in FORMATS[: slowly(len(FORMATS))]:
            assert_same_answers(one, four, calibration, kv, one.bound.random_tokens(1200))


def test_weights_in_4_bits_and_their_experts_are_divided(tmp_path: Path):
    """A text has the same logits but for what the choice of experts, which is no layer of its own, rounds otherwise."""
    one = alone(packed_mixture(tmp_path), deterministic=False)
    with divided(one.path, deterministic=False) as two:
        packed, shares = ([layer.nbytes for layer in packed_layers(model.bound.hf).values()] for model in (one, two))
        assert 2 * sum(shares) == sum(packed)
        found, expected = (torch.cat(list(LLM(model, "fp32").reading.logits(range(100)))) for model in (two, one))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_under_torchrun_rank_0_goes_on_alone(tmp_path: Path):
    """Each rank runs the script; one line is printed."""
    path = tiny(tmp_path, 2)
    script = tmp_path / "script.py"
    script.write_text(
        "from octavo import LLM, SamplingParams\n"
        f"llm = LLM({str(path)!r}, 'fp32', device='cpu', dtype='float32', session_len=64, tensor_parallel_size=2)\n"
        "print(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8))[0].token_ids)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    keyed = os.environ | {"OCTAVO_RANKS_KEY": "a secret"}
    done = subprocess.run(torchrun, capture_output=True, text=True, check=False, timeout=600, env=keyed)
    assert done.returncode == 0, done.stderr
    llm = LLM(alone(path), "fp32", session_len=64)
    assert done.stdout.strip() == str(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8))[0].token_ids)
