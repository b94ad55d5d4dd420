"""The progress bar of every verb that takes longer than a second."""

from __future__ import annotations

import sys
from typing import Any


def progress() -> Any:
    """A progress bar on stderr that leaves nothing behind but its last line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
