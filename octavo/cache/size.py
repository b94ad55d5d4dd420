"""What a cache takes, and how many blocks it gets: those asked for, or what sessions need within what memory allows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, own_span
from octavo.devices import Device
from octavo.errors import OctavoError
from octavo.quant.format import KVFormat, by_layer

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
BLOCK_SIZE = Layout.block_size  # tokens, unless said otherwise
SPARE = 4  # first pages beside those of the sequences that run


def parse_bytes(text: str) -> int:
    """'4GiB', '512 MB', '1e9B' → bytes. A number needs a unit: who writes 80 means GiB, and would get bytes."""
    match = re.fullmatch(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[0-9]+)?)\s*([kmgt]i?b?|b|)", text.strip().lower())
    if not match:
        raise OctavoError(f"{text!r} is not an amount of memory; write it like 4GiB or 512MB")
    number, unit = float(match[1]), match[2]
    if number and not unit:
        raise OctavoError(f"{text!r} has no unit; write {text.strip()}GiB, {text.strip()}MiB or {text.strip()}B")
    size = number * UNITS[unit.removesuffix("b")]
    if size == float("inf"):
        raise OctavoError(f"{text!r} is more memory than there is")
    return int(size)


def format_bytes(n: float) -> str:
    """Bytes → '1.5 GiB', with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1000 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.{max(0, 3 - len(str(int(n))))}f} {unit}"
        n /= 1024
    raise AssertionError


@dataclass(frozen=True)
class CacheSize:
    """What a cache consists of, in bytes of all its layers. `KVCache.nbytes` is `cache(blocks, sessions)`, but for what
    a layout keeps after the last block (`SLACK`)."""

    block_size: int  # tokens
    block: int  # bytes
    raw_page: int  # bytes of `block_size` rows at an edge, in the model's own type; 0 without edges
    ring: int  # raw pages of a running session's own span; 0 without edges

    @classmethod
    def of(
        cls, shapes: Sequence[LayerShape], formats: KVFormat | Iterable[KVFormat], block_size: int = BLOCK_SIZE
    ) -> CacheSize:
        """Of layers of these shapes; `formats` is one for each, or one for all."""
        each = by_layer(formats, len(shapes))
        pairs = list(zip(shapes, each, strict=True))
        return cls(
            block_size,
            block_size * sum(shape.token_bytes(format) for shape, format in pairs),
            block_size * sum(shape.raw_token_bytes(format) for shape, format in pairs),
            own_span(each, block_size) // block_size,
        )

    @property
    def token(self) -> int:
        """Bytes of one token's codes."""
        return self.block // self.block_size

    @property
    def spare(self) -> int:
        """Raw pages of a cache beside those of sessions: for the beginnings of conversations that wait for their next
        message."""
        return SPARE if self.ring else 0

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def raw_pages(self, sessions: int) -> int:
        """Of a cache for `sessions` running sequences: a ring and a first page each, and the spare ones."""
        return sessions * (self.ring + 1) + self.spare if self.ring else 0

    def session(self, tokens: int) -> int:
        """Bytes of a running session; its last block counts whole."""
        return self.blocks(tokens) * self.block + self.raw_page * (self.raw_pages(1) - self.spare)

    def cache(self, blocks: int, sessions: int) -> int:
        """Bytes of a whole cache."""
        return blocks * self.block + self.raw_pages(sessions) * self.raw_page


def num_blocks(
    size: CacheSize,
    sessions: int,
    session_len: int,
    device: Device,
    memory: int | None = None,
    share: float | None = None,
    step: int = 0,
) -> int:
    """Blocks of a cache for `sessions` sessions of `session_len` tokens, beside its raw pages.

    `memory` bytes are taken as asked for; else what the sessions need (all, where the memory is dedicated), within
    `share` of the memory that is free once the largest step has taken its `step` bytes.
    """
    free, fixed = max(0, device.free_memory() - step), size.cache(0, sessions)
    if memory is not None:
        if share is not None:
            raise OctavoError("--kv-cache-memory and --cache-max-entry-count both size the KV cache; give one")
        if memory > free:
            raise OctavoError(f"a KV cache of {format_bytes(memory)} does not fit: {format_bytes(free)} are free")
        blocks = (memory - fixed) // size.block
        if blocks < 1:
            raw = f", and the edges of {sessions} sessions {format_bytes(fixed)}" if fixed else ""
            cache = f"a KV cache of {format_bytes(memory)} holds not one block"
            raise OctavoError(f"{cache}; a block takes {format_bytes(size.block)}{raw}")
        return blocks
    share = device.cache_share if share is None else share
    if not 0 < share <= 1:
        raise OctavoError(f"--cache-max-entry-count is a share of the free memory between 0 and 1, not {share}")
    fits = (int(free * share) - fixed) // size.block
    if fits < 1:
        needed = format_bytes(size.cache(1, sessions))
        raise OctavoError(f"only {format_bytes(free)} are free: too little for a cache of one block, {needed}")
    return fits if device.dedicated else min(sessions * size.blocks(session_len), fits)
