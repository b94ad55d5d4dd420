"""Progress bars."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from octavo.cli.progress import Tell, progress


def shown(bars: Any) -> str:
    """What stands at the end of each bar's line."""
    screen = Console(file=io.StringIO(), width=100)
    screen.print(bars.get_renderable())
    return screen.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def test_a_bar_has_a_time_left_from_its_beginning() -> None:
    bars, now = progress(), 0.0
    bars.get_time = lambda: now
    tell = Tell(bars, "reading", 60.0)
    assert "1:00 left" in shown(bars)
    now = 10.0
    tell("reading a text", 0, 0)
    assert "0/? 1:00 left" in shown(bars)
    now = 30.0
    assert "0:40 left" in shown(bars)
    tell("reading a text", 1, 4)
    assert "1/4 1:00 left" in shown(bars), "as what is done has taken"
    tell("reading a text", 4, 4)
    tell("the next", 0, 4)
    assert "0/4 0:00 passed" in shown(bars)
