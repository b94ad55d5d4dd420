"""What tokens take in the cache, beside what 16 bits would take: the arithmetic of `/stats` and of the stats lines.

A session takes whole blocks; the partly filled last one counts in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.llm import LLM


@dataclass(frozen=True)
class Footprint:
    """The cache of one session of `tokens` stored tokens."""

    format: str
    tokens: int
    block_size: int
    token_bytes: int  # of one token in all layers
    token_bytes_16: int  # the same in 16 bits

    @classmethod
    def of(cls, llm: LLM, tokens: int) -> Footprint:
        from octavo.cache.size import block_bytes
        from octavo.quant.format import KVFormat

        cache = llm.cache
        token_bytes_16 = block_bytes(cache.shapes, [KVFormat.parse("bf16")] * len(cache.shapes), 1)
        return cls(str(llm.format), tokens, cache.layout.block_size, cache.token_nbytes, token_bytes_16)

    @property
    def blocks(self) -> int:
        return -(-self.tokens // self.block_size)

    @property
    def last_block(self) -> int:
        """Tokens in the last block."""
        return self.tokens - max(0, self.blocks - 1) * self.block_size

    @property
    def nbytes(self) -> int:
        return self.blocks * self.block_size * self.token_bytes

    @property
    def nbytes_16(self) -> int:
        return self.blocks * self.block_size * self.token_bytes_16

    @property
    def ratio(self) -> float:
        """Sessions that fit where one of 16 bits does."""
        return self.token_bytes_16 / self.token_bytes


def worst_saturation(llm: LLM) -> tuple[float, str]:
    """The largest share of values outside the calibrated range, and where: (0.0012, "V of layer 3")."""
    by_layer = enumerate(llm.cache.saturation())
    return max((share, f"{side} of layer {i}") for i, kv in by_layer for side, share in zip("KV", kv, strict=True))
