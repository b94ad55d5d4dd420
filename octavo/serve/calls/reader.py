"""Finds calls in the text of a growing answer. What is looked at is what is new: nothing is read twice."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from octavo.serve.calls.syntax import Syntax

LONGEST_HEAD = 256  # characters that a name and what stands around it may have
FENCE = re.compile(r"```\w*\s*")


@dataclass(frozen=True)
class CallPiece:
    """A piece of a call, as OpenAI streams them: id and name come with the first one, arguments with any."""

    number: int  # of the call in its answer, from 0
    arguments: str  # a piece of JSON
    id: str | None = None
    name: str | None = None


Part = str | CallPiece


class Reader(Protocol):
    """The text of a growing answer, as text to show and calls."""

    def push(self, text: str) -> list[Part]:
        """Add text; returns what is certain by now."""

    def finish(self) -> list[Part]:
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


class _Text:
    """What both readers do outside of calls: text is shown, but for the space around calls and what may begin one."""

    def __init__(self, syntax: Syntax):
        self.syntax = syntax
        self.held = ""
        self.number = 0  # of the next call
        self.shown = False  # whether there was anything but space

    def _show(self, parts: list[Part], end: int) -> None:
        text, self.held = self.held[:end], self.held[end:]
        if text:
            self.shown = True
            parts.append(text)

    def _find_begin(self, parts: list[Part]) -> int | None:
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

    def _call(self, name: str, arguments: str) -> CallPiece:
        self.number += 1
        return CallPiece(self.number - 1, arguments, self.syntax.new_id(), name)


class FreeReader(_Text):
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

    def push(self, text: str) -> list[Part]:
        self.held += text
        parts: list[Part] = []
        while self.state(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        rest = self.held.strip()
        cut_off = self.state == self._after and (self.syntax.end.startswith(rest) or "```".startswith(rest))
        if self.number and (not rest or cut_off):
            self.held = ""
        self._show(parts, len(self.held))
        return parts

    # A state takes what it can from `held`; it returns whether there is something left for the next one.

    def _opening(self, _: list[Part]) -> bool:
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

    def _prose(self, parts: list[Part]) -> bool:
        inside = self._find_begin(parts)
        return inside is not None and self._expect(inside, self._value)

    def _value(self, parts: list[Part]) -> bool:
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
        if not any(isinstance(one, CallPiece) for one in calls):
            return self._give_up(parts)
        parts += calls
        self.held = self.held[end:]
        return self._expect(0, self._after)

    def _after(self, _: list[Part]) -> bool:
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

    def _give_up(self, parts: list[Part]) -> bool:
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

    def _calls(self, text: str) -> list[Part]:
        """The calls that a value is; what of a list is none is text, and so is all of it if none is one."""
        try:
            value = self.syntax.read(text)
        except (ValueError, RecursionError):
            return [text]
        if self.name is not None:
            value = {"name": self.name, "arguments": value}
        listed = value if isinstance(value, list) else [value]
        found: list[Part] = []
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


UNFRAMED = re.compile(
    r'\s*(?:```(?:json)?\s*)?\{\s*"name":\s*"([\w.-]+)",\s*"(?:arguments|parameters)":\s*(?=\{)',
)


class HeldReader(_Text):
    """Reads what a grammar held to the syntax: arguments are passed on as they come. Calls without their frame are read
    where the grammar holds them too: at the answer's beginning, and after another call."""

    def __init__(self, syntax: Syntax, names: Collection[str]):
        super().__init__(syntax)
        self.names = names
        self.unframed = False  # the call that is read
        self.call = re.compile(rf"{re.escape(syntax.before)}([\w.-]+){re.escape(syntax.between)}(?=\{{)")
        self.arguments: Span | None = None
        self.inside = False  # of a block

    def push(self, text: str) -> list[Part]:
        self.held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if not self.inside:  # else what was cut off is the frame of a call
            self._show(parts, len(self.held) if self.held.strip(" \n`") or not self.number else 0)
        return parts

    def _step(self, parts: list[Part]) -> bool:
        if self.arguments is not None:
            return self._argue(parts, self.arguments)
        if not self.inside:
            if self.syntax.bare and not self.shown and self.held.lstrip()[:1] in ("", self.syntax.before[0]):
                self.inside = bool(self.held.strip())
            elif self._may_be_unframed():
                return self._find_unframed(parts)
            elif (inside := self._find_begin(parts)) is not None:
                self.inside, self.held = True, self.held[inside:]
            return self.inside
        if self.unframed:
            return self._end_unframed()
        if found := self.call.search(self.held):
            self.held = self.held[found.end() :]
            parts.append(self._call(found[1], ""))
            self.arguments = Span(0, self.syntax.quote)
            return True
        end = self.syntax.end
        if self.number and end and self.held.lstrip().startswith(self.syntax.after + self.syntax.closing + end):
            self.held = self.held[self.held.index(end) + len(end) :]
            self.inside = False
            return True
        return False

    def _may_be_unframed(self) -> bool:
        here = not self.shown and self.syntax.head is None and not self.syntax.bare
        return here and len(self.held) < LONGEST_HEAD and self.held.lstrip()[:1] in ("{", "`")

    def _find_unframed(self, parts: list[Part]) -> bool:
        found = UNFRAMED.match(self.held)
        if found is None or found[1] not in self.names:
            return False
        self.held = self.held[found.end() :]
        parts.append(self._call(found[1], ""))
        self.arguments, self.inside, self.unframed = Span(0), True, True
        return True

    def _end_unframed(self) -> bool:
        rest = self.held.lstrip()
        after = rest[1:].lstrip()
        if not rest.startswith("}") or (len(after) < 3 and "```".startswith(after)):
            return False
        self.held = after.removeprefix("```")
        self.inside = self.unframed = False
        return True

    def _argue(self, parts: list[Part], span: Span) -> bool:
        end = span.end(self.held)
        cut = span.at if end is None else end
        if cut:
            parts.append(CallPiece(self.number - 1, self.held[:cut]))
        self.held = self.held[cut:]
        self.arguments = None if end is not None else span
        span.at -= cut
        return end is not None
