"""benchmarks/gpu.py at toy sizes on a CPU: that every part of it still runs, and what ends one that does not end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_every_part_runs_dry() -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--dry-run", "--parts", "kernels", "engine", "memory"]
    where = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=where)
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout.splitlines()[-1])["parts"]
    assert list(parts) == ["kernels", "engine", "memory"]
    for name, part in parts.items():
        errors = [row["error"] for row in part["rows"] if "error" in row]
        assert (part["exit"], part["rows"] != []) == (0, True), (name, part)
        assert all("flashinfer" in error for error in errors), errors  # it is not installed
    assert "DRY RUN" in done.stdout


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
