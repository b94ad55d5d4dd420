"""Calls in answers that a grammar constrains (grammar.py): their form is known, so they are passed on as they come."""

import re
from collections.abc import Collection

from octavo.serve.calls.reader import LONGEST_HEAD, CallDelta, Piece, Span, TextReader
from octavo.serve.calls.syntax import Syntax

UNFRAMED = re.compile(
    r'\s*(?:```(?:json)?\s*)?\{\s*"name":\s*"([\w.-]+)",\s*"(?:arguments|parameters)":\s*(?=\{)',
)


class ConstrainedReader(TextReader):
    """Reads what a grammar constrained to the syntax: arguments are passed on as they come. Calls without their frame
    are read where the grammar has them too: at the answer's beginning, and after another call."""

    def __init__(self, syntax: Syntax, names: Collection[str]):
        super().__init__(syntax)
        self.names = names
        self.unframed = False  # the call that is read
        self.call = re.compile(rf"{re.escape(syntax.before)}([\w.-]+){re.escape(syntax.between)}(?=\{{)")
        self.arguments: Span | None = None
        self.inside = False  # of a block

    def finish(self) -> list[Piece]:
        parts: list[Piece] = []
        if not self.inside:  # else what was cut off is the frame of a call
            self._show(parts, len(self.held) if self.held.strip(" \n`") or not self.number else 0)
        return parts

    def _step(self, parts: list[Piece]) -> bool:
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

    def _find_unframed(self, parts: list[Piece]) -> bool:
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

    def _argue(self, parts: list[Piece], span: Span) -> bool:
        end = span.end(self.held)
        cut = span.at if end is None else end
        if cut:
            parts.append(CallDelta(self.number - 1, self.held[:cut]))
        self.held = self.held[cut:]
        self.arguments = None if end is not None else span
        span.at -= cut
        return end is not None
