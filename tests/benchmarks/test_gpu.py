"""benchmarks/gpu.py at toy sizes on a CPU: that every part of it still runs, and what ends one that does not end."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.measure.memory.process import CannotMeasure, Filled, Request

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.mark.parametrize("part", ["kernels", "engine", "memory", "transformers_batching"])
def test_every_part_runs_dry(part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu: Any):
    """On a CPU and at toy sizes, kernels by the kernels of a CPU: what a change elsewhere breaks shows all the same.
    Points of memory, a process each, are computed and not measured."""

    def too_small(request: Request) -> Filled:  # noqa: ARG001
        raise CannotMeasure("this machine is too small")

    monkeypatch.setattr("octavo.measure.memory.points.measure", too_small)
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu_parts"))
    monkeypatch.setattr(sys, "argv", [part, "--dry-run"])
    runpy.run_path(str(BENCHMARKS / "gpu_parts" / f"{part}.py"), run_name="__main__")
    rows = [row for line in capsys.readouterr().out.splitlines() if (row := gpu.parse(line))]
    assert [row["error"] for row in rows if "error" in row and row["measure"] != "flashinfer decode"] == []
    document = {"dry_run": True, "parts": {part: {"exit": 0, "rows": rows}}}
    assert gpu.table(document).startswith("DRY RUN")
    assert gpu.table(document).count("\n") >= 4  # a line at least beside the head


def test_a_part_out_of_time_ends_with_all_it_has_started(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A child that has inherited the pipe would be read from until it ends."""
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(alive)!r}).touch()"
    (tmp_path / "gpu_parts").mkdir()
    (tmp_path / "gpu_parts" / "slow.py").write_text(
        f'import subprocess, sys\nprint(\'ROW {{"measure": "first"}}\', flush=True)\n'
        f"subprocess.run([sys.executable, '-c', {child!r}])\n"
    )
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    start = time.monotonic()
    found = gpu.run("slow", 2, dry=False)
    assert time.monotonic() - start < 4
    assert (found["exit"], found["rows"]) == (None, [{"measure": "first"}])
    time.sleep(4.5 - (time.monotonic() - start))
    assert not alive.exists()
