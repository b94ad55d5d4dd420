"""A part of benchmarks/gpu.py runs in a process of its own and says what it finds row by row, so that what it has found
outlives its own crash, and its crash the other parts."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from typing import Any

MARK = "ROW "


def dry_run() -> bool:
    """What a part is asked: whether to run at toy sizes on the CPU."""
    cli = argparse.ArgumentParser()
    cli.add_argument("--dry-run", action="store_true")
    return cli.parse_args().dry_run


def emit(row: dict[str, Any]) -> None:
    print(MARK + json.dumps(row), flush=True)


def guarded(what: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Emit `what` was measured with what `measure` found, or with the traceback of its failure."""
    try:
        emit(what | measure())
    except Exception as error:
        emit(what | {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})


def parse(line: str) -> dict[str, Any] | None:
    return json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else None
