"""Calls in what a model wrote freely: found by JSON, whatever stands around it."""

import json
import re
from collections.abc import Collection
from typing import Any

from octavo.serve.calls.reader import LONGEST_HEAD, CallDelta, Piece, Span, TextReader
from octavo.serve.calls.syntax import Syntax

FENCE = re.compile(r"```\w*\s*")


class FreeReader(TextReader):
    """Reads what a model wrote freely. A call is passed on once it is whole, so what looked like one and was none is
    text: JSON that is broken off, NaN, a function that nobody gave. `begin` is not needed at the answer's beginning:
    small models forget it, or write a fence of code in its place."""

    def __init__(self, syntax: Syntax, names: Collection[str]):
        super().__init__(syntax)
        self.names = names
        self.span: Span | None = None  # of the value that is being read
        self.start = 0  # where it starts in `held`
        self.name: str | None = None  # that stood before it
        self.state = self._opening

    def _step(self, parts: list[Piece]) -> bool:
        return self.state(parts)

    def finish(self) -> list[Piece]:
        parts: list[Piece] = []
        rest = self.held.strip()
        cut_off = self.state == self._after and (self.syntax.end.startswith(rest) or "```".startswith(rest))
        if self.number and (not rest or cut_off):
            self.held = ""
        self._show(parts, len(self.held))
        return parts

    # Each state is a step.

    def _opening(self, _: list[Piece]) -> bool:
        """Nothing has come but space."""
        said = self.held.lstrip()
        if not said or (self.syntax.begin and self.syntax.begin.startswith(said)):
            return False
        if self.syntax.begin and said.startswith(self.syntax.begin):
            return self._expect(0, self._prose)
        fence = FENCE.match(said)
        inside = said[fence.end() :] if fence else said
        if "```".startswith(said) or not inside:
            return False
        if inside.startswith(("{", "[")):
            self.held = said
            return self._expect(len(said) - len(inside), self._value)
        return self._expect(0, self._prose)

    def _prose(self, parts: list[Piece]) -> bool:
        inside = self._find_begin(parts)
        return inside is not None and self._expect(inside, self._value)

    def _value(self, parts: list[Piece]) -> bool:
        """A value that may be a call, or several."""
        if self.span is None:
            start = self._value_start()
            if start is None:
                return False
            if start < 0:
                return self._give_up(parts)
            self.start, self.span = start, Span(start, self.syntax.quote)
        end = self.span.end(self.held)
        if end is None:
            return False
        calls = self._calls(self.held[self.start : end])
        if not any(isinstance(one, CallDelta) for one in calls):
            return self._give_up(parts)
        parts += calls
        self.held = self.held[end:]
        return self._expect(0, self._after)

    def _after(self, _: list[Piece]) -> bool:
        """A call is over; another may follow in its block."""
        rest = self.held.lstrip()
        end = self.syntax.end
        if end and rest.startswith(end):
            self.held = rest[len(end) :]
            return self._expect(0, self._prose)
        if not rest or (end and end.startswith(rest)) or "```".startswith(rest):
            return False
        if rest.startswith("```"):
            self.held = rest[3:]
            return self._expect(0, self._prose)
        if rest[0] in ";,":
            rest = rest[1:].lstrip()
            if not rest:
                return False
        if rest[0] == "{" and self.syntax.head is None:
            self.held = rest
            return self._expect(0, self._value)
        return self._expect(0, self._prose)

    def _expect(self, start: int, state: Any) -> bool:
        self.state, self.start, self.span, self.name = state, start, None, None
        return True

    def _give_up(self, parts: list[Piece]) -> bool:
        """What `held` begins with is no call: it is text, up to where another may begin."""
        self._show(parts, max(1, self.start))
        return self._expect(0, self._prose)

    def _value_start(self) -> int | None:
        """Where the value starts; None if that is not known yet, −1 if there is none."""
        rest = self.held[self.start :]
        said = rest.lstrip()
        space = len(rest) - len(said)
        if not said:
            return None if space < LONGEST_HEAD else -1
        if said[0] == "{" or (said[0] == "[" and self.syntax.head is None):
            return self.start + space
        if self.syntax.head is None:
            return -1
        if said[0] == "[":  # a list of calls, or what stands around a name
            return self.start + space if re.match(r"\[\s*\{", said) else None if said.strip("[ \n") == "" else -1
        at = rest.find("{")
        if at < 0:
            return None if len(rest) < LONGEST_HEAD else -1
        head = self.syntax.head.fullmatch(rest[:at])
        self.name = head["name"] if head else None
        return self.start + at if head else -1

    def _calls(self, text: str) -> list[Piece]:
        """The calls that a value is; what of a list is none is text, and so is all of it if none is one."""
        try:
            value = self.syntax.read(text)
        except (ValueError, RecursionError):
            return [text]
        if self.name is not None:
            value = {"name": self.name, "arguments": value}
        listed = value if isinstance(value, list) else [value]
        found: list[Piece] = []
        for one in listed:
            name, arguments = _named(one, self.names)
            found.append(self._call(name, arguments) if name else json.dumps(one, ensure_ascii=False))
        return found


def _named(value: Any, names: Collection[str]) -> tuple[str | None, str]:
    """The function that a JSON value calls, if it does, and its arguments, which may be JSON in a string."""
    if not isinstance(value, dict):
        return None, ""
    if isinstance(function := value.get("function"), dict):
        value = function
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments, strict=False) if arguments.strip() else {}
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return None, ""
        return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):  # no JSON, NaN among its numbers
        return None, ""
