"""What a session takes in the cache, beside what 16 bits would take: the numbers of `/stats` and of the lines of stats.

A session takes whole blocks; the partly filled last one counts in full. With edges it takes raw pages besides, and a
slot of states where layers keep some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.cache.size import CacheSize
from octavo.quant.format import KVFormat

if TYPE_CHECKING:
    from octavo.llm import LLM


@dataclass(frozen=True)
class Footprint:
    """The cache of one session of `tokens` stored tokens."""

    format: str
    tokens: int
    size: CacheSize
    size_16: CacheSize  # the same in 16 bits

    @classmethod
    def of(cls, llm: LLM, tokens: int) -> Footprint:
        states = llm.cache.states.plan if llm.cache.states is not None else None
        sixteen = CacheSize.of(llm.cache.shapes, KVFormat.parse("bf16"), states=states)
        return cls(str(llm.format), tokens, llm.cache.size, sixteen)

    @property
    def blocks(self) -> int:
        return self.size.blocks(self.tokens)

    @property
    def last_block(self) -> int:
        """Tokens in the last block."""
        return (self.tokens - 1) % self.size.block_size + 1 if self.tokens else 0

    @property
    def nbytes(self) -> int:
        return self.size.session(self.tokens) if self.tokens else 0

    @property
    def nbytes_16(self) -> int:
        return self.size_16.session(self.tokens)


def whole_cache(llm: LLM) -> dict[str, Any]:
    """What all sessions have together, ready for JSON: `octavo serve` tells it."""
    cache, one = llm.cache, Footprint.of(llm, llm.session_len)
    return {
        "kv": one.format,
        "cache_bytes": cache.nbytes,
        "cache_tokens": cache.num_blocks * cache.layout.block_size,
        "session_len": llm.session_len,
        "sessions": cache.num_blocks // one.blocks,
        "token_bytes": one.size.token,
        "token_bytes_16_bits": one.size_16.token,
    }
