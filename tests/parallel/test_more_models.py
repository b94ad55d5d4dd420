"""Two ranks answer as one on the bundled model, with one KV head for both, and under torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.engine.params import SamplingParams
from octavo.llm import LLM
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from tests.conftest import observe
from tests.parallel.models import CLOSE, FLIPPED, FORMATS, alone, answers, assert_equal, divided, prompts, tiny

pytestmark = pytest.mark.slow


def assert_formats_equal(one: Model, two: Model, calibration: Calibration, text: list[int], count: int) -> None:
    """In so many of them; in chunks, after prefix hits and preemptions."""
    for kv in sorted(FORMATS, key=lambda kv: kv != "kv8")[:count]:
        block = 64 if kv.startswith("k") else 16
        asked = prompts(one.bound, block)
        if text:
            first, second, third = map(len, asked)
            asked = [
                text[:first],
                text[: first // 2] + text[900 : 900 + second - first // 2],
                text[2000 : 2000 + third],
            ]
        expected = answers(one.bound, kv, calibration, asked, block_size=block)
        found = answers(two.bound, kv, calibration, asked, block_size=block, budget=5 * block // 2, blocks=13)
        assert any(sequence.preemptions for sequence in found), kv
        assert any(sequence.prefix_hit for sequence in found), kv
        assert_equal(found, expected, CLOSE if kv == "fp32" else FLIPPED)


def test_two_ranks_answer_as_one_on_pamphlet(
    pamphlet: Model, calibration: Calibration, text_ids: list[int], slowly: Callable[[int], int]
):
    with divided(None) as two:
        assert_formats_equal(pamphlet, two, calibration, text_ids, slowly(len(FORMATS)))


def test_two_ranks_with_one_kv_head_for_both_answer_as_one(tmp_path: Path, slowly: Callable[[int], int]):
    one = alone(tiny(tmp_path, 1))
    calibration = observe(one.bound, one.bound.random_tokens(200), one.fingerprint)
    with divided(one.path) as two:
        assert [(share.starts, share.total) for share in two.bound.shares] == [((0, 0), 1)] * 2  # type: ignore[attr-defined]
        assert_formats_equal(one, two, calibration, [], slowly(len(FORMATS)))


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
    done = subprocess.run(torchrun, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    llm = LLM(alone(path), "fp32", session_len=64)
    assert done.stdout.strip() == str(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8))[0].token_ids)
