"""Where a result was measured, as every results file carries it: the machine, the versions and the commit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

from octavo.measure import machine


def describe() -> dict[str, Any]:
    return {"commit": _commit(), **machine.describe(torch.device("cpu"))}


def _commit() -> str:
    where = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "../octavo"], cwd=where, capture_output=True, text=True)
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
