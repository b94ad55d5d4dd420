"""The progress bar of every verb that takes longer than a second."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.models.model import Model
    from octavo.quant.calibration import Calibration
    from octavo.quant.format import Format


def say(line: str) -> None:
    """What a command is about to do, on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def warnings_after() -> Iterator[None]:
    """The block's warnings are shown at its end, and not in the middle of the answer that it writes."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for warning in caught:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def progress() -> Any:
    """Progress bars on stderr, each of which leaves its last line. A task's field `seconds` is what it was estimated to
    take: it stands there as the time left until something is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        def render(self, task: Task) -> Text:
            elapsed = task.finished_time if task.finished_time is not None else task.elapsed or 0.0
            left = task.time_remaining
            if left is None and task.completed and task.remaining is not None:
                left = elapsed * task.remaining / task.completed
            elif left is None and task.fields.get("seconds") is not None:
                left = max(0.0, task.fields["seconds"] - elapsed)
            if task.finished or left is None:
                return Text(f"{_clock(elapsed)} passed", style="progress.elapsed")
            return Text(f"{_clock(left)} left", style="progress.remaining")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeLeft(),
        console=Console(file=sys.stderr),
        speed_estimate_period=60,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Tell:
    """A bar for each thing that is done: called with what, how much of it, and of how much, 0 if that is not known.
    `seconds` is what the first of them that tells of how much was estimated to take."""

    def __init__(self, bars: Any, first: str, seconds: float | None = None):
        self.bars, self.seconds = bars, seconds
        self.tasks = {first: bars.add_task(first, total=None, seconds=seconds)}  # so that something is there at once

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            for name, task in list(self.tasks.items()):
                if self.bars.tasks[self.bars.task_ids.index(task)].total is None:  # nothing to be seen of it
                    self.bars.remove_task(self.tasks.pop(name))
            self.tasks[what] = self.bars.add_task(what, total=None, seconds=self.seconds)
            self.seconds = None
        self.bars.update(self.tasks[what], completed=done, total=total or None)

    def say(self, line: str) -> None:
        """A line that stays, above the bars."""
        self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def telling(first: str, seconds: float | None = None) -> Iterator[Tell]:
    """Bars on stderr for a work of several parts, the first of which is `first`; `seconds` as in Tell."""
    with progress() as bars:
        yield Tell(bars, first, seconds)


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
