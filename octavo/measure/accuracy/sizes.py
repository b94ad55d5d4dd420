"""How much of a text is read, and how many answers are written, in the time there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.measure.budget import Budget, Fit, Windows

if TYPE_CHECKING:
    from octavo.measure.pace import Pace

WANTED, LEAST = Windows(16, 1024), Windows(4, 256)  # that are read
ANSWERS, FEWEST = Windows(16, 256), Windows(4, 64)  # greedy ones, and their tokens
PROMPT = 256  # tokens of a window's beginning, at most half of it, that are answered
READING = 0.7  # of the time, where answers are compared too

Given = tuple[int | None, int | None, int | None]


def prompt_length(window: int) -> int:
    return min(PROMPT, -(-window // 2))


def choose(pace: Pace, budget: Budget, formats: int, given: Given, context: int) -> tuple[Fit, Fit]:
    """The windows to read, and the answers to their beginnings, each in all of `formats`. `given` are windows, tokens
    in each, and answers, where the user names them: those are never cut. One format has no answers to compare."""
    count, length, answers = given
    wanted = Windows(count or WANTED.count, length or min(WANTED.length, context))
    without = answers == 0 or formats == 1
    read = budget.part(1.0 if without else READING).fit(
        wanted, wanted if count or length else LEAST, lambda size: formats * pace.read(size.tokens, logits=True)
    )
    prompt = prompt_length(read.size.length)
    asked = Windows(0 if without else min(answers or ANSWERS.count, read.size.count),
                    min(ANSWERS.length, context - prompt))  # fmt: skip
    write = budget.less(read.seconds).fit(
        asked,
        asked if answers or without else FEWEST,
        lambda size: formats * (pace.read(size.count * prompt) + pace.write(size.count, size.length)),
        "answer",
    )
    return read, write
