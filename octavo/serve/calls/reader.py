"""Finds calls in the text of a growing answer. What is looked at is what is new: nothing is read twice."""

import re
from dataclasses import dataclass
from typing import Protocol

from octavo.serve.calls.syntax import Syntax

LONGEST_HEAD = 256  # characters that a name and what stands around it may have


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call, as OpenAI streams them: id and name come with the first one, arguments with any."""

    number: int  # of the call in its answer, from 0
    arguments: str  # a piece of JSON
    id: str | None = None
    name: str | None = None


Piece = str | CallDelta


class Reader(Protocol):
    """The text of a growing answer, as text to show and calls."""

    def push(self, text: str) -> list[Piece]:
        """Add text; returns what is certain by now."""

    def finish(self) -> list[Piece]:
        """What is left at the end."""


class Span:
    """Finds the end of a JSON object or list in a text that grows."""

    def __init__(self, start: int, quote: str = '"'):
        self.at, self.depth, self.quoted = start, 0, False
        self.quote = quote
        self.outside = re.compile(rf"[{{}}\[\]]|{re.escape(quote)}")
        self.inside = re.compile(rf"{re.escape(quote)}|\\(?:.|\Z)" if quote == '"' else re.escape(quote), re.DOTALL)

    def end(self, text: str) -> int | None:
        """Where it ends, if it does."""
        while found := (self.inside if self.quoted else self.outside).search(text, self.at):
            if found[0] == "\\":  # what it escapes is still to come
                self.at = found.start()
                return None
            self.at = found.end()
            if found[0] == self.quote:
                self.quoted = not self.quoted
            elif not self.quoted:
                self.depth += 1 if found[0] in "{[" else -1
                if self.depth == 0:
                    return self.at
        self.at = max(self.at, len(text) - len(self.quote) + 1)  # a quote of several characters may have begun
        return None


class TextReader:
    """What both readers do outside of calls: text is shown, but for the space around calls and what may begin one."""

    def __init__(self, syntax: Syntax):
        self.syntax = syntax
        self.held = ""
        self.number = 0  # of the next call
        self.shown = False  # whether there was anything but space

    def push(self, text: str) -> list[Piece]:
        self.held += text
        parts: list[Piece] = []
        while self._step(parts):
            pass
        return parts

    def _step(self, parts: list[Piece]) -> bool:
        """Take what is certain from `held`; whether there may be more."""
        raise NotImplementedError

    def _show(self, parts: list[Piece], end: int) -> None:
        text, self.held = self.held[:end], self.held[end:]
        if text:
            self.shown = True
            parts.append(text)

    def _find_begin(self, parts: list[Piece]) -> int | None:
        """Show text up to the next block; where in `held` its inside begins, if there is one."""
        begin = self.syntax.begin
        at = self.held.find(begin) if begin else -1
        if at >= 0:
            text = len(self.held[:at].rstrip())
            self._show(parts, text)
            return at - text + len(begin)
        certain = len(self.held)
        if begin:
            certain -= next(n for n in range(min(len(begin), certain), -1, -1) if self.held.endswith(begin[:n]))
        self._show(parts, len(self.held[:certain].rstrip()))
        return None

    def _call(self, name: str, arguments: str) -> CallDelta:
        self.number += 1
        return CallDelta(self.number - 1, arguments, self.syntax.new_id(), name)
