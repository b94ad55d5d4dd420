"""The progress bar of every verb that takes longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def telling(first: str) -> Iterator[Callable[[str, int, int], None]]:
    """The same as a function of (what is being done, how much of it, of how much; 0 if that is not known)."""
    with progress() as bar:
        task = bar.add_task(first, total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield tell
