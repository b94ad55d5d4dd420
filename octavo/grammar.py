"""Answers that match a JSON schema: llguidance tells before every token which ones may come.

It is an extra (`pip install 'octavo[serve]'`), imported when the first schema is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from octavo.errors import OctavoError

BITS = torch.arange(32, dtype=torch.int32)
# One way to write a value, that of json.dumps: small models that may put white space between two tokens never stop.
SPELLING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JSONGuide:
    """One answer's way through a grammar. Belongs to one sequence."""

    def __init__(self, matcher: Any, vocab_size: int):
        self.matcher = matcher
        self.bits = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)

    def restrict(self, row: Tensor) -> None:
        """Set the logits [vocabulary] of all tokens that must not come next to -inf; after the whole JSON value that is
        all but the end of the answer. Raises OctavoError where the library gives up: its limits are reached."""
        self.matcher.unsafe_compute_mask_ptr(self.bits.data_ptr(), self.bits.nbytes)
        if self.matcher.is_error():
            raise OctavoError(f"the JSON schema cannot be followed further: {self.matcher.get_error()}")
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
        """Raises OctavoError for a schema that is none, or that asks for what the grammar library cannot check."""
        try:
            text = json.dumps(schema, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise OctavoError(f"the JSON schema cannot be served: it is no JSON: {error}", "json_schema") from None
        return JSONGuide(self._compiled(text).deep_copy(), self.vocab_size)

    def _compile(self, schema: str) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise OctavoError("json_schema needs llguidance: pip install 'octavo[serve]'", "json_schema") from None
        try:
            matcher = LLMatcher(
                self._tokens, LLMatcher.grammar_from_json_schema(schema, overrides=SPELLING), log_level=0
            )
            reason = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            reason = str(error)
        if reason:
            raise OctavoError(f"the JSON schema cannot be served: {reason.splitlines()[0]}", "json_schema")
        return matcher

    @cached_property
    def _tokens(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper
        from llguidance.hf import from_tokenizer

        if hasattr(self.tokenizer, "sp_model"):
            pieces = Pieces(self.tokenizer, self.vocab_size, self.eos_ids)
            return LLTokenizer(TokenizerWrapper(pieces), n_vocab=self.vocab_size, eos_token=self.eos_ids)
        return from_tokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=self.eos_ids)


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
