"""Answers that match a JSON schema: llguidance tells before every token which ones may come.

It is an extra (`pip install 'octavo[serve]'`), imported when the first schema is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
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

    def guide(self, schema: Mapping[str, Any]) -> JSONGuide:
        """Raises OctavoError for a schema that is none, or that asks for what the grammar library cannot check."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise OctavoError("json_schema needs llguidance: pip install 'octavo[serve]'") from None
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SPELLING)
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise OctavoError(f"the JSON schema cannot be served: {matcher.get_error().splitlines()[0]}")
        return JSONGuide(matcher, self.vocab_size)

    @cached_property
    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=self.eos_ids)
