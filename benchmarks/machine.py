"""Where a result was measured, as every results file carries it: the machine, the versions and the commit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

from octavo.measure import machine


def describe() -> dict[str, Any]:
    return {"commit": commit(), **machine.describe(torch.device("cpu"))}


def commit() -> str | None:
    """Of the working tree; None where there is no git or no repository."""
    where = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "../octavo")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
