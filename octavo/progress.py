"""What a long work calls while it goes on, so that something can be shown. Each is called often and returns at once."""

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, and of how much: 0 until that is known
Count = Callable[[int, int], None]  # of a work of one part: how much is done, of how much
Share = Callable[[str, float], None]  # what is being done, and the share that is done of all parts together


def within(progress: Share, what: str, begin: float, width: float) -> Count:
    """Tells `progress` of one part, which goes from the share `begin` of all parts to `begin + width`."""
    return lambda done, total: progress(what, begin + width * done / total)


def silent(*_: Any) -> None:
    """Where nothing is shown."""
