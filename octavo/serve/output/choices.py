"""The output of a request, as the one value that every route writes in its own form.

As in OpenAI's API a request has one or more choices. `Output.take` makes of each `Delta` of the engine a `ChoiceDelta`:
text to show, pieces of calls, and tokens with their log-probabilities. The sum of a choice's deltas is its `Choice`.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from octavo.completion import Completion, Delta
from octavo.engine.prompt_logprobs import Scored
from octavo.serve.calls import CallDelta, Reader
from octavo.serve.output.logprobs import ShownToken, TokenTexts
from octavo.serve.requests.generate import GenerateRequest
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
class ChoiceDelta:
    """What one choice has gained, in its order: text to show and pieces of calls."""

    index: int  # of the choice
    first: bool  # nothing came before
    parts: Sequence[str | CallDelta]
    tokens: Sequence[ShownToken]  # where log-probabilities were asked for
    token_ids: Sequence[int]
    reason: Reason | None = None  # why it ended, with the last piece

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[CallDelta]:
        """The pieces of calls, one of each call: clients read no second one."""
        found: dict[int, CallDelta] = {}
        for part in self.parts:
            if isinstance(part, CallDelta):
                first = found.get(part.number)
                found[part.number] = replace(first, arguments=first.arguments + part.arguments) if first else part
        return list(found.values())

    @property
    def empty(self) -> bool:
        """Whether it tells nothing: its text may yet be part of a call."""
        return not (self.first or self.parts or self.tokens or self.reason)


@dataclass
class Choice:
    """A choice as far as it has come."""

    pieces: list[str | CallDelta] = field(default_factory=list)
    tokens: list[ShownToken] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    reason: Reason | None = None
    completion: Completion | None = None  # the engine's, once it has ended

    @property
    def parts(self) -> list[str | Call]:
        """Text and calls in their order."""
        parts: list[str | Call] = []
        for called, group in groupby(self.pieces, lambda piece: piece.number if isinstance(piece, CallDelta) else None):
            if called is None:
                parts.append("".join(text for text in group if isinstance(text, str)))
                continue
            first, *rest = (piece for piece in group if isinstance(piece, CallDelta))
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
        return any(isinstance(piece, CallDelta) for piece in self.pieces)

    def add(self, delta: ChoiceDelta) -> None:
        self.pieces += delta.parts
        if delta.tokens:
            self.tokens += delta.tokens
        self.token_ids += delta.token_ids
        self.reason = delta.reason


class Output:
    """All choices of one request. `reader` finds calls in a choice's text, where functions may be called; `prefix` of
    the id is the route's own."""

    def __init__(
        self,
        request: GenerateRequest,
        bytes_of: TokenBytes,
        prefix: str,
        reader: Callable[[], Reader] | None = None,
    ):
        self.request = request
        self.bytes_of = bytes_of
        self.id, self.created = f"{prefix}{request.id or uuid.uuid4().hex}", int(time.time())
        count = request.choices
        self.choices = [Choice() for _ in range(count)]
        self.prompts: list[list[int]] = []  # the token ids of each, once they are known
        self.prompt_tokens: list[list[Scored | None]] = []  # of each, where their log-probabilities were asked for
        self._readers = [reader() for _ in range(count)] if reader else None
        hidden = bytes_of.special if request.sampling.get("skip_special_tokens") is not False else frozenset()
        wanted = request.sampling.get("logprobs") is not None
        self._texts = [TokenTexts(bytes_of, hidden) for _ in range(count)] if wanted else None
        self._begun = [False] * count

    def take(self, delta: Delta) -> ChoiceDelta:
        """What the choice gains by a delta of the engine."""
        i, ended = delta.index, delta.completion
        parts: list[str | CallDelta] = [delta.text] if delta.text else []
        if self._readers:
            parts = self._readers[i].push(delta.text)
            if ended:
                parts += self._readers[i].finish()
        tokens = self._texts[i].take(delta.sampled, delta.text, ended) if self._texts else ()
        choice = self.choices[i]
        gained = ChoiceDelta(i, not self._begun[i], parts, tokens, [one.token for one in delta.sampled])
        choice.add(gained)
        if ended:
            choice.completion = ended
            assert ended.finish_reason != "error"  # it is no answer (service.py)
            called = choice.called and ended.finish_reason == "stop"
            gained.reason = choice.reason = "tool_calls" if called else ended.finish_reason
        self._begun[i] = True
        return gained

    @property
    def usage(self) -> Usage:
        """Of the choices that have ended."""
        done = [choice.completion for choice in self.choices]
        firsts = [one for one in done[:: self.request.n] if one]
        return Usage(
            sum(one.prompt_tokens for one in firsts),
            sum(len(one.token_ids) for one in done if one),
            sum(one.cached_tokens for one in firsts),
        )
