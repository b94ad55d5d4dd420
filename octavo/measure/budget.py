"""A time that a measurement may take, and how much of it fits: fewer windows and shorter ones, down to a least.

A verb measures a few steps of the model (pace.py) and knows from them what its work takes. It wants a size, of which
the largest that fits is taken. Below the least it would say nothing: then it takes longer, and says so before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from octavo.errors import OctavoError

DEFAULT = "2m"
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Windows:
    """Pieces of text, or answers: how many, and tokens in each."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True)
class Fit:
    """The size that was chosen, and what it takes, in seconds."""

    size: Windows
    wanted: Windows
    seconds: float
    budget: Budget
    thing: str = "window"

    def __str__(self) -> str:
        return self.of(1)

    def of(self, formats: int) -> str:
        """`8 windows of 512 tokens in 5 formats, about 50 s: cut from 16 of 512 to fit --budget 2m`."""
        count = self.size.count
        told = f"{count} {self.thing}{'s' * (count != 1)} of {self.size.length:,} tokens"
        told += f" in {formats} formats" * (formats > 1) + f", about {duration(self.seconds)}"
        if self.size != self.wanted:
            told += f": cut from {self.wanted.count} of {self.wanted.length:,} to fit --budget {self.budget}"
        if not self.budget.holds(self.seconds):
            told += "; no fewer would do" if self.size != self.wanted else f", beyond --budget {self.budget}"
        return told


@dataclass(frozen=True)
class Budget:
    """Seconds that the work of a command may take once the model is loaded; None: as long as it takes."""

    seconds: float | None
    text: str = "none"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`2m`, `90s`, `1h30m` or `none`."""
        written = text.strip().lower()
        if written == "none":
            return cls(None)
        parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([hms])", written)
        seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
        if "".join(map("".join, parts)) != written or not seconds:
            raise OctavoError(f"--budget {text}: write a time like 90s, 2m or 1h30m, or none")
        return cls(seconds, written)

    def part(self, share: float) -> Budget:
        """A share of the time, for one of several works."""
        return self if self.seconds is None else Budget(share * self.seconds, self.text)

    def less(self, seconds: float) -> Budget:
        """What is left once `seconds` are spent."""
        return self if self.seconds is None else Budget(max(0.0, self.seconds - seconds), self.text)

    def holds(self, seconds: float) -> bool:
        return self.seconds is None or seconds <= self.seconds

    def holds_another(self, begun: float, done: int) -> bool:
        """Whether one more fits beside those `done` since that reading of `perf_counter`, as long as each of them."""
        return self.holds((perf_counter() - begun) * (done + 1) / done)

    def over(self, begun: float) -> bool:
        """Whether it is spent by work that began at that reading of `perf_counter`: an estimate cannot know what else
        will run."""
        return not self.holds(perf_counter() - begun)

    def fit(self, wanted: Windows, least: Windows, seconds: Callable[[Windows], float], thing: str = "window") -> Fit:
        """The largest size from `wanted` down to `least`: rather fewer windows than shorter ones."""
        size, length = wanted, wanted.length
        while not self.holds(seconds(size)):
            if size.count > least.count:
                size = Windows(size.count - 1, length)
            elif length // 2 >= least.length:
                length //= 2
                size = Windows(wanted.count, length)
            else:
                break
        return Fit(size, wanted, seconds(size), self, thing)

    def __str__(self) -> str:
        return self.text


NO_LIMIT = Budget(None)


def duration(seconds: float) -> str:
    """In words that are as exact as an estimate: `8 s`, `2 min 10 s`, `1 h 25 min`."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds / 10) * 10, 60)
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h" + (f" {minutes} min" if minutes else "")
