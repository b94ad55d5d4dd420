"""Answers that match a grammar: llguidance tells before every token which ones may come.

It comes with the extra `serve` and is imported when the first grammar is asked for.

A schema is small and what it demands may be large. So it is measured before it is compiled (`size.py`), and compiled on
a thread with a deep stack, since the library follows references by recursion, within the library's own limits. What
following it costs afterwards is measured too: a grammar whose tokens take too long ends its own answers.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from octavo.errors import OctavoError, install
from octavo.grammars.closing import Closing
from octavo.grammars.sentencepiece import Pieces
from octavo.grammars.sources import growth, named, refused, source

T = TypeVar("T")
STACK_SIZE = threading.Lock()  # it is one setting of the whole process
BITS = torch.arange(32, dtype=torch.int32)

# llguidance's own limits. A state of its lexer takes 1 to 2 kB, of every answer; a row is what may come at one place.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 400_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # else an error quotes the grammar
}
STACK = 256 << 20  # bytes of address space for the compiling thread; a schema of the largest size needs some 10 MB
COMPILE_SECONDS = 10  # of one schema; within the limits above none was seen to take more than two
START_SECONDS, TOKEN_SECONDS = 0.5, 0.005  # what the answers to one grammar may take on the engine's thread
CANDIDATES = 16  # tokens that are tried where answers must end soon
FEWEST_BYTES = 2  # of a token on the way to an end: names, quotes and brackets
TOKEN = re.compile(r"<\[(\d+)\]>")  # a token by its id, in a grammar


class Clock:
    """The time that following one grammar takes, by all answers to it."""

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0

    @property
    def over(self) -> bool:
        return self.seconds > START_SECONDS + TOKEN_SECONDS * self.tokens

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.tokens += 1


@dataclass(frozen=True)
class Compiled:
    """A grammar that guides are made of."""

    kind: str
    matcher: Any
    closing: Closing
    clock: Clock
    growth: int  # tokens, at most, by which one token makes the shortest end longer


class GrammarGuide:
    """One answer's way through a grammar, to an end within the tokens that it may have. Belongs to one sequence."""

    def __init__(self, compiled: Compiled, vocab_size: int):
        self.compiled, self.closing = compiled, compiled.closing
        self.matcher, self.clock = compiled.matcher.deep_copy(), compiled.clock
        self.bits = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)
        self.cut = False  # whether an end was chosen because tokens ran out
        self.next_look = 1 << 62  # room at which the way to an end is looked for
        self.way: list[int] = []  # the last that was found, as far as it has not been gone

    def restrict(self, row: Tensor, room: int) -> None:
        """Set the logits [vocabulary] of all tokens that must not come next to -inf; after all of the grammar that is
        all but the end of the answer. `room` tokens may still come. Raises OctavoError where the library gives up, or
        has taken too long."""
        name = named(self.compiled.kind)
        if self.clock.over:
            raise OctavoError(f"the {name} takes more than {TOKEN_SECONDS * 1000:g} ms a token to follow")
        start = time.perf_counter()
        self.matcher.unsafe_compute_mask_ptr(self.bits.data_ptr(), self.bits.nbytes)
        self.clock.add(time.perf_counter() - start)
        if self.matcher.is_error():
            raise OctavoError(f"the {name} cannot be followed further: {first_line(self.matcher.get_error())}")
        allowed = (self.bits[:, None] >> BITS) & 1
        only = allowed.flatten().nonzero()
        if (
            len(only) == 1
            and not self.matcher.validate_tokens([int(only)])
            and (spelled := self.closing.forced(self.matcher))
        ):  # a special token's name within a text
            allowed.flatten()[only] = 0
            allowed.flatten()[spelled[0]] = 1
        row.masked_fill_((allowed.flatten()[: len(row)] == 0).to(row.device), -torch.inf)
        if room <= self.next_look and not self.matcher.is_stopped():  # else nothing but the end may come
            self._end_in_time(row, room)

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)
        if self.way[:1] == [token]:
            self.way = self.way[1:]

    def _end_in_time(self, row: Tensor, room: int) -> None:
        """Leave only tokens after which there is room for an end, once it could be missed by the next token."""
        known = 0 < len(self.way) <= room and self.closing.completes(self.matcher, self.way)
        way = self.way if known else self.closing.way(self.matcher, room)
        self.way = way or []
        if way is None:  # too late: the shortest end that is known is longer
            self.next_look = -1
            return
        spare = room - len(way)
        if spare > self.compiled.growth:
            self.next_look = room - max(1, (spare - self.compiled.growth) // 4)  # a token may open several brackets
            return
        best = row.topk(min(CANDIDATES, len(row)))
        tried = best.indices[best.values > -torch.inf].tolist()
        kept = [token for token in tried if self.closing.ends(self.matcher, token, way, room - 1)]
        self.cut |= tried[:1] != kept[:1]
        if len(kept) == len(tried) and spare > CANDIDATES:
            return
        kept += way[:1]  # none is left where the answer is complete
        if kept:
            only = torch.tensor(kept, device=row.device)
            values = row[only]
            row.fill_(-torch.inf)
            row[only] = values


class Grammars:
    """Makes guides for a model's tokens."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Iterable[int]):
        self.tokenizer, self.vocab_size, self.eos_ids = tokenizer, vocab_size, sorted(eos_ids)
        self._compiled = lru_cache(16)(self._compile)  # the answers of one request, and clients that keep to a schema

    def guide(self, kind: str, value: Any) -> GrammarGuide:
        """One answer's guide. `kind` is one of `CONSTRAINTS` (params.py). Raises OctavoError for what is none of that
        kind, is beyond the limits, asks for what the grammar library cannot check, or takes too long to compile. The
        caller waits, up to COMPILE_SECONDS."""
        try:
            text = source(kind, value)
        except ImportError:
            raise OctavoError(f"{kind} needs llguidance: {install('serve')}", kind) from None
        except ValueError as error:
            raise refused(kind, first_line(str(error))) from None
        return GrammarGuide(self._compiled(kind, text, growth(kind, value)), self.vocab_size)

    def prepare(self) -> None:
        """Have the vocabulary ready for the first grammar: seconds for a large one, on the interpreter's lock."""
        _ = self._tokens

    def _compile(self, kind: str, grammar: str, growth: int) -> Compiled:
        from llguidance import LLMatcher, LLParserLimits

        try:
            tokens = self._tokens  # made once; its time is not the grammar's
        except ValueError as error:
            raise refused(kind, first_line(str(error))) from None

        def compile() -> tuple[Any, str]:
            matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
            return matcher, matcher.get_error() if matcher.is_error() else ""

        try:
            matcher, reason = _with_deep_stack(compile, COMPILE_SECONDS)
        except TimeoutError:
            raise refused(kind, f"compiling it takes more than {COMPILE_SECONDS} s") from None
        if reason:
            raise refused(kind, first_line(reason))
        closing = Closing(tokens, self.vocab_size, {int(id) for id in TOKEN.findall(grammar)})
        return Compiled(kind, matcher, closing, Clock(), growth // FEWEST_BYTES)

    @cached_property
    def _tokens(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper
        from llguidance.hf import from_tokenizer

        if hasattr(self.tokenizer, "sp_model"):
            pieces = Pieces(self.tokenizer, self.vocab_size, self.eos_ids)
            return LLTokenizer(TokenizerWrapper(pieces), n_vocab=self.vocab_size, eos_token=self.eos_ids)
        return from_tokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=self.eos_ids)


def _with_deep_stack(function: Callable[[], T], seconds: float) -> T:
    """What `function` returns, run on a thread whose stack is larger than an ordinary one's. Raises TimeoutError after
    so many seconds; the thread cannot be stopped, and ends by the library's limits."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # a panic of the library is none of Exception
            future.set_exception(error)

    with STACK_SIZE:
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=run, name="octavo grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return future.result(seconds)


def first_line(error: str) -> str:
    """What the library says, without what it quotes."""
    return (error.splitlines() or [""])[0][:200]
