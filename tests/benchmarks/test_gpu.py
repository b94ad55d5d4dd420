"""benchmarks/gpu.py at toy sizes on a CPU: that every part of it still runs, and what ends one that does not end."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from octavo.measure.memory.process import CannotMeasure, Filled, Request
from tests.conftest import wait_until

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
    where = str(tmp_path / "child")
    child = f"import os, pathlib, time; pathlib.Path({where!r}).write_text(str(os.getpid())); time.sleep(600)"
    (tmp_path / "gpu_parts").mkdir()
    (tmp_path / "gpu_parts" / "slow.py").write_text(
        f'import subprocess, sys\nprint(\'ROW {{"measure": "first"}}\', flush=True)\n'
        f"subprocess.run([sys.executable, '-c', {child!r}])\n"
    )
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    found = gpu.run("slow", 2, dry=False)
    assert (found["exit"], found["rows"]) == (None, [{"measure": "first"}])
    started = int((tmp_path / "child").read_text())
    wait_until(lambda: not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE)
