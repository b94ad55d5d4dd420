"""The tables that verbs print: each file renders one verb's from the value that its --json prints."""

from __future__ import annotations

import math
import sys

from rich import box
from rich.console import Console
from rich.table import Table

LEFT = {"", "format", "weights", "kind", "KV", "tokens", "task", "dataset", "metric"}  # columns of words


def table(title: str, *columns: str) -> Table:
    found = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in columns:
        found.add_column(name, justify="left" if name in LEFT else "right")
    return found


def console() -> Console:
    """On stdout; where that is no terminal, wide enough for the tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def mib(n: int | None) -> str:
    """Bytes as MiB, with a decimal where they are few; a dash where there is no number."""
    if n is None:
        return "–"
    size = n / 2**20
    if n % 2**20 == 0 or abs(size) >= 1000:
        return f"{size:,.0f}"
    return f"{size:,.1f}" if abs(size) >= 0.1 else f"{size:.2g}"


def plus_minus(value: float, error: float, format: str, error_format: str | None = None) -> str:
    """value ± its standard error, which a single window or item has not."""
    if not math.isfinite(error):
        return f"{value:{format}}"
    return f"{value:{format}} ± {error:{error_format or format}}"
