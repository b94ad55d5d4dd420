"""What is answered: the one value that every route writes in its own form.

`Answers.take` makes of each piece of the engine's (`Delta`) a `Piece`: text to show, pieces of calls, and tokens with
their log-probabilities. The sum of an answer's pieces is its `Choice`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from octavo.completion import Completion, Delta
from octavo.engine.scoring import Scored
from octavo.serve.asked import Asked
from octavo.serve.calls import CallPiece, Reader
from octavo.serve.token_texts import ShownToken, TokenTexts
from octavo.token_bytes import TokenBytes

Reason = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True)
class Call:
    """A call of a function that an answer holds."""

    id: str
    name: str
    arguments: str  # JSON


@dataclass(frozen=True)
class Usage:
    """Tokens; a prompt counts once, however many answers it has."""

    prompt: int
    generated: int
    cached: int  # of the prompt, found in the prefix cache


@dataclass(slots=True)
class Piece:
    """What came of one answer, in its order: text to show and pieces of calls."""

    index: int  # of the answer
    first: bool  # nothing came before
    parts: Sequence[str | CallPiece]
    tokens: Sequence[ShownToken]  # where log-probabilities were asked for
    token_ids: Sequence[int]
    reason: Reason | None = None  # why it ended, with the last piece

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[CallPiece]:
        """The pieces of calls, one of each call: clients read no second one."""
        found: dict[int, CallPiece] = {}
        for part in self.parts:
            if isinstance(part, CallPiece):
                first = found.get(part.number)
                found[part.number] = replace(first, arguments=first.arguments + part.arguments) if first else part
        return list(found.values())

    @property
    def empty(self) -> bool:
        """Whether it tells nothing: its text may yet be part of a call."""
        return not (self.first or self.parts or self.tokens or self.reason)


@dataclass
class Choice:
    """An answer as far as it has come."""

    pieces: list[str | CallPiece] = field(default_factory=list)
    tokens: list[ShownToken] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    reason: Reason | None = None
    completion: Completion | None = None  # the engine's, once it has ended

    @property
    def parts(self) -> list[str | Call]:
        """Text and calls in their order."""
        parts: list[str | Call] = []
        for called, group in groupby(self.pieces, lambda piece: piece.number if isinstance(piece, CallPiece) else None):
            if called is None:
                parts.append("".join(text for text in group if isinstance(text, str)))
                continue
            first, *rest = (piece for piece in group if isinstance(piece, CallPiece))
            arguments = first.arguments + "".join(piece.arguments for piece in rest)
            parts.append(Call(first.id or "", first.name or "", arguments))
        return parts

    @property
    def text(self) -> str:
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def calls(self) -> list[Call]:
        return [part for part in self.parts if isinstance(part, Call)]

    @property
    def called(self) -> bool:
        """Whether it has a call."""
        return any(isinstance(piece, CallPiece) for piece in self.pieces)

    def add(self, piece: Piece) -> None:
        self.pieces += piece.parts
        if piece.tokens:
            self.tokens += piece.tokens
        self.token_ids += piece.token_ids
        self.reason = piece.reason


class Answers:
    """All answers to one request. `reader` finds calls in an answer's text, where functions may be called; `prefix` of
    the id is the route's own."""

    def __init__(
        self,
        asked: Asked,
        bytes_of: TokenBytes,
        prefix: str,
        reader: Callable[[], Reader] | None = None,
    ):
        self.asked = asked
        self.bytes_of = bytes_of
        self.id, self.created = f"{prefix}{asked.id or uuid.uuid4().hex}", int(time.time())
        count = asked.choices
        self.choices = [Choice() for _ in range(count)]
        self.prompts: list[list[int]] = []  # the token ids of each, once they are known
        self.prompt_tokens: list[list[Scored | None]] = []  # of each, where their log-probabilities were asked for
        self._readers = [reader() for _ in range(count)] if reader else None
        hidden = bytes_of.special if asked.sampling.get("skip_special_tokens") is not False else frozenset()
        wanted = asked.sampling.get("logprobs") is not None
        self._texts = [TokenTexts(bytes_of, hidden) for _ in range(count)] if wanted else None
        self._begun = [False] * count

    def take(self, delta: Delta) -> Piece:
        """The piece of an answer that `delta` is."""
        i, ended = delta.index, delta.completion
        parts: list[str | CallPiece] = [delta.text] if delta.text else []
        if self._readers:
            parts = self._readers[i].push(delta.text)
            if ended:
                parts += self._readers[i].finish()
        tokens = self._texts[i].take(delta.sampled, delta.text, ended) if self._texts else ()
        choice = self.choices[i]
        piece = Piece(i, not self._begun[i], parts, tokens, [one.token for one in delta.sampled])
        choice.add(piece)
        if ended:
            choice.completion = ended
            assert ended.finish_reason != "error"  # it is no answer (service.py)
            called = choice.called and ended.finish_reason == "stop"
            piece.reason = choice.reason = "tool_calls" if called else ended.finish_reason
        self._begun[i] = True
        return piece

    @property
    def usage(self) -> Usage:
        """Of the answers that have ended."""
        done = [choice.completion for choice in self.choices]
        firsts = [one for one in done[:: self.asked.n] if one]
        return Usage(
            sum(one.prompt_tokens for one in firsts),
            sum(len(one.token_ids) for one in done if one),
            sum(one.cached_tokens for one in firsts),
        )
