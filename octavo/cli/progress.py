"""The progress bar of every verb that takes longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.models.model import Model
    from octavo.quant.calibration import Calibration
    from octavo.quant.format import Format


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


def calibration_with_bar(model: Model, given: Path | None, format: Format) -> Calibration | None:
    """`octavo.calibrate.calibration_for`, with a bar where it makes one."""
    from octavo.calibrate import calibration_for

    bar = progress()

    def tell(done: int, total: int) -> None:
        if not bar.task_ids:
            bar.start()
            bar.add_task("calibrating", total=total)
        bar.update(bar.task_ids[0], completed=done)

    try:
        return calibration_for(model, given, format, tell)
    finally:
        if bar.task_ids:  # a bar that never stood would leave an empty line
            bar.stop()
