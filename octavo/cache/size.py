"""How many blocks a cache gets: what was asked for, or what the sessions need within what memory allows."""

from __future__ import annotations

import re
from collections.abc import Sequence

import psutil
import torch

from octavo.cache.plan import LayerShape
from octavo.errors import OctavoError
from octavo.quant.format import KVFormat

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SPARE = 4  # first pages beside those of the sequences that run
DEFAULT_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of the memory that is free once the model is loaded


def parse_bytes(text: str) -> int:
    """'4GiB', '512 MB', '1e9' → bytes."""
    match = re.fullmatch(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not match:
        raise OctavoError(f"{text!r} is not an amount of memory; write it like 4GiB or 512MB")
    size = float(match[1]) * UNITS[match[2]]
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


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def block_bytes(shapes: Sequence[LayerShape], formats: Sequence[KVFormat], block_size: int) -> int:
    """Bytes of one block in all layers."""
    return block_size * sum(shape.token_bytes(format) for shape, format in zip(shapes, formats, strict=True))


def raw_pages(span: int, block_size: int, sessions: int) -> int:
    """Raw pages of a cache with edges: for each of `sessions` running sequences its ring and its first page, and SPARE
    first pages of conversations that wait for their next message. 0 without edges."""
    return sessions * (span // block_size + 1) + SPARE if span else 0


def raw_page_bytes(shapes: Sequence[LayerShape], formats: Sequence[KVFormat], block_size: int) -> int:
    """Bytes of one raw page in all layers that have edges."""
    return sum(shape.raw_page_bytes(format, block_size) for shape, format in zip(shapes, formats, strict=True))


def num_blocks(
    one_block: int,
    sessions: int,
    session_blocks: int,
    device: torch.device,
    memory: int | None = None,
    share: float | None = None,
    step: int = 0,
    fixed: int = 0,
) -> int:
    """Blocks of `one_block` bytes each for `sessions` sessions of `session_blocks` blocks, beside raw pages of `fixed`
    bytes.

    `memory` bytes are taken as asked for; else what the sessions need on a CPU, everything on a GPU, within `share` of
    the memory that is free once the largest step has taken its `step` bytes.
    """
    free = max(0, free_memory(device) - step)
    if memory is not None:
        if share is not None:
            raise OctavoError("--kv-cache-memory and --cache-max-entry-count both size the KV cache; give one")
        if memory > free:
            raise OctavoError(f"a KV cache of {format_bytes(memory)} does not fit: {format_bytes(free)} are free")
        blocks = (memory - fixed) // one_block
        if blocks < 1:
            raw = f", and the edges of {sessions} sessions {format_bytes(fixed)}" if fixed else ""
            cache = f"a KV cache of {format_bytes(memory)} holds not one block"
            raise OctavoError(f"{cache}; a block takes {format_bytes(one_block)}{raw}")
        return blocks
    share = DEFAULT_SHARE[device.type] if share is None else share
    if not 0 < share <= 1:
        raise OctavoError(f"--cache-max-entry-count is a share of the free memory between 0 and 1, not {share}")
    fits = (int(free * share) - fixed) // one_block
    if fits < 1:
        needed = format_bytes(one_block + fixed)
        raise OctavoError(f"only {format_bytes(free)} are free: too little for a cache of one block, {needed}")
    return fits if device.type == "cuda" else min(sessions * session_blocks, fits)
