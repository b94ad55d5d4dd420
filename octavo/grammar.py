"""Answers that match a JSON schema: llguidance tells before every token which ones may come.

It comes with the extra `serve` and is imported when the first schema is asked for.

A schema is small and what it demands may be large. So it is measured before it is compiled (`schema_size.py`), and
compiled on a thread with a deep stack, since the library follows references by recursion, within the library's own
limits. What following it costs afterwards is measured too: a schema whose tokens take too long ends its own answers.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from octavo.errors import OctavoError, install
from octavo.schema_size import measure_schema

T = TypeVar("T")
STACK_SIZE = threading.Lock()  # it is one setting of the whole process
BITS = torch.arange(32, dtype=torch.int32)
# One way to write a value, that of json.dumps: small models that may put white space between two tokens never stop.
SPELLING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
START_SECONDS, TOKEN_SECONDS = 0.5, 0.005  # what the answers to one schema may take on the engine's thread


class Clock:
    """The time that following one schema takes, by all answers to it."""

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0

    @property
    def over(self) -> bool:
        return self.seconds > START_SECONDS + TOKEN_SECONDS * self.tokens

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.tokens += 1


class JSONGuide:
    """One answer's way through a grammar. Belongs to one sequence."""

    def __init__(self, matcher: Any, vocab_size: int, clock: Clock):
        self.matcher, self.clock = matcher, clock
        self.bits = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)

    def restrict(self, row: Tensor) -> None:
        """Set the logits [vocabulary] of all tokens that must not come next to -inf; after the whole JSON value that is
        all but the end of the answer. Raises OctavoError where the library gives up, or has taken too long."""
        if self.clock.over:
            raise OctavoError(f"the JSON schema takes more than {TOKEN_SECONDS * 1000:g} ms a token to follow")
        start = time.perf_counter()
        self.matcher.unsafe_compute_mask_ptr(self.bits.data_ptr(), self.bits.nbytes)
        self.clock.add(time.perf_counter() - start)
        if self.matcher.is_error():
            raise OctavoError(f"the JSON schema cannot be followed further: {_first_line(self.matcher.get_error())}")
        allowed = (self.bits[:, None] >> BITS) & 1
        row.masked_fill_((allowed.flatten()[: len(row)] == 0).to(row.device), -torch.inf)

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)


class Grammars:
    """Makes guides for a model's tokens."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Iterable[int]):
        self.tokenizer, self.vocab_size, self.eos_ids = tokenizer, vocab_size, sorted(eos_ids)
        self._compiled = lru_cache(16)(self._compile)  # the answers of one request, and clients that keep to a schema

    def guide(self, schema: Mapping[str, Any]) -> JSONGuide:
        """Raises OctavoError for a schema that is none, that is beyond the limits, or that asks for what the grammar
        library cannot check, or takes too long to compile. The caller waits, up to COMPILE_SECONDS."""
        try:
            measure_schema(schema)
            text = json.dumps(schema, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise _refused(f"it is no JSON: {error}") from None
        matcher, clock = self._compiled(text)
        return JSONGuide(matcher.deep_copy(), self.vocab_size, clock)

    def prepare(self) -> None:
        """Have the vocabulary ready for the first schema: seconds for a large one, on the interpreter's lock."""
        _ = self._tokens

    def _compile(self, schema: str) -> tuple[Any, Clock]:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise OctavoError(f"json_schema needs llguidance: {install('serve')}", "json_schema") from None

        try:
            tokens = self._tokens  # made once; its time is not the schema's
        except ValueError as error:
            raise _refused(str(error)) from None

        def compile() -> tuple[Any, str]:
            try:
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides=SPELLING)
                matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
            except ValueError as error:
                return None, str(error)
            return matcher, matcher.get_error() if matcher.is_error() else ""

        try:
            matcher, reason = _with_deep_stack(compile, COMPILE_SECONDS)
        except TimeoutError:
            raise _refused(f"compiling it takes more than {COMPILE_SECONDS} s") from None
        if reason:
            raise _refused(reason)
        return matcher, Clock()

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


def _refused(reason: str) -> OctavoError:
    return OctavoError(f"the JSON schema cannot be served: {_first_line(reason)}", "json_schema")


def _first_line(error: str) -> str:
    """What the library says, without what it quotes."""
    return (error.splitlines() or [""])[0][:200]


class Pieces:
    """A sentencepiece model as llguidance asks for it: the bytes of every token, and how text becomes tokens."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: list[int]):
        self.model = tokenizer.sp_model
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, eos_ids[0]
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *eos_ids}
        self.tokens: list[bytes] = []
        for token in range(vocab_size):
            if token >= len(self.model) or self.model.is_control(token) or self.model.is_unused(token):
                special.add(token)
            self.tokens.append(self._bytes(token))
        self.special_token_ids = sorted(special)
        self.ids = {own: token for token, own in enumerate(self.tokens) if own and token not in special}
        self.longest = max(map(len, self.ids))

    def __call__(self, text: str) -> list[int]:
        """The longest tokens first. sentencepiece itself would put a space before a text that begins a line."""
        rest, tokens = text.encode(), list[int]()
        while size := next((n for n in range(min(self.longest, len(rest)), 0, -1) if rest[:n] in self.ids), 0):
            tokens.append(self.ids[rest[:size]])
            rest = rest[size:]
        return tokens

    def _bytes(self, token: int) -> bytes:
        if token >= len(self.model):  # an embedding padded beyond the vocabulary
            return b"<pad>"
        piece: str = self.model.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if self.model.is_byte(token) else piece.replace("▁", " ").encode()
