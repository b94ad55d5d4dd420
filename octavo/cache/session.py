"""A session in a file: the tokens of a conversation and the codes of its K and V, just as they lay in the cache.

The file is an artefact (octavo/artefact.py). Its tensors are the rows of whole blocks, `layers.{i}.{k,v}.codes` [heads,
tokens, width] and, in token formats, `….scales` [heads, tokens], and with edges the raw rows of page 0,
`layers.{i}.first.{k,v}.codes`; in no layout of a device's or kernel's: what one wrote another reads. Its header holds
the tokens and what the codes mean. It comes first in the file, so that an incomplete file still has the tokens, from
which codes can be computed again; damaged codes are never used.

The last, partly filled block is left out: its tokens, fewer than a block has, are computed again with what follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from octavo import artefact
from octavo.artefact import Artefact, Damaged
from octavo.cache.blocks import BlockPool
from octavo.cache.layout import RowLayout
from octavo.cache.plan import CPU
from octavo.cache.store import KVCache, RowStore
from octavo.errors import OctavoError

VERSION = 2

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
FIRST = ".first."  # in the names of page 0's raw rows

Codes = dict[str, Tensor]  # rows, by the names above
Copies = list[tuple[Tensor, Tensor | None]]  # codes and scales of some blocks of every store, in its own layout


@dataclass(frozen=True)
class Identity:
    """What codes mean. They can be read again only where all of it is equal."""

    model: str  # fingerprint of the weights
    arithmetic: str  # dtype and rotary frequencies that K and V were computed with
    shapes: list[list[int]]  # KV heads, K dim and V dim of each layer that has a cache of its own
    formats: list[str]  # of each such layer
    calibration: str  # digest of mu and c of every layer

    @classmethod
    def of(cls, cache: KVCache, model: str, arithmetic: str) -> Identity:
        own = [plan for plan in cache.plans if plan.shape.shares is None]
        statics = {
            f"{i}.{name}": getattr(store.static, name)
            for i, store in enumerate(cache.stores)
            if store.static is not None
            for name in ("mu", "c")
        }
        return cls(
            model,
            arithmetic,
            [[plan.shape.kv_heads, plan.shape.k_dim, plan.shape.v_dim] for plan in own],
            [str(plan.format) for plan in own],
            artefact.digest_of(statics),
        )

    @property
    def format(self) -> str:
        """The formats' name, for people."""
        return " and ".join(dict.fromkeys(self.formats))


@dataclass(frozen=True)
class Header:
    """What a session file says of its tensors."""

    version: int
    tokens: list[Token]  # of the whole conversation
    identity: Identity
    about: dict[str, Any] = field(repr=False)  # what its owner keeps beside it


@dataclass(frozen=True)
class SavedSession:
    """A session file, of which the header has been read."""

    file: Artefact = field(repr=False)
    header: Header

    @classmethod
    def open(cls, path: Path) -> SavedSession:
        """Read the header. Raises Damaged where it is not what was written, OctavoError where it cannot be read."""
        file = Artefact.open(path)
        return cls(file, file.parse(Header, VERSION))

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def tokens(self) -> list[int]:
        return self.header.tokens

    @property
    def about(self) -> dict[str, Any]:
        return self.header.about

    def check(self, here: Identity, vocab_size: int) -> None:
        """Raise OctavoError where codes mean something else than in this file, or tokens that this model has not."""
        saved, otherwise = self.header.identity, "serve as it was saved, or begin the conversation anew"
        if saved.model != here.model:
            raise OctavoError(
                f"{self.path}: saved with other weights ({saved.model[:19]}…) than these ({here.model[:19]}…); "
                f"{otherwise}"
            )
        if saved.formats != here.formats:
            raise OctavoError(f"{self.path}: holds {saved.format} codes, and this cache {here.format}; {otherwise}")
        if saved.calibration != here.calibration:
            raise OctavoError(f"{self.path}: saved under another calibration, granularity or headroom; {otherwise}")
        if (saved.arithmetic, saved.shapes) != (here.arithmetic, here.shapes):
            raise OctavoError(
                f"{self.path}: holds K and V computed with {saved.arithmetic}, and this model runs with "
                f"{here.arithmetic}; {otherwise}"
            )
        if max(self.tokens, default=0) >= vocab_size:
            raise Damaged(f"{self.path}: token {max(self.tokens)} is not in the model's vocabulary of {vocab_size}")

    def codes(self, cache: KVCache) -> Codes:
        """The rows, for a cache that they are of. Raises Damaged unless they are what was written and what such a cache
        holds, OctavoError where the file cannot be read."""
        codes = self.file.tensors()
        expected = _kinds(cache)
        if codes.keys() != expected.keys():
            strange = sorted(codes.keys() ^ expected.keys())[0]
            raise Damaged(f"{self.path}: the tensor {strange} is {'missing' if strange in expected else 'unknown'}")
        for name, tensor in codes.items():
            dtype, heads, width = expected[name]
            count = rows(codes) if FIRST not in name else min(rows(codes), cache.layout.block_size)
            if tensor.dtype != dtype or tensor.shape != (heads, count, *width):
                raise Damaged(f"{self.path}: the tensor {name} does not have the shape or type of this cache's rows")
            if dtype.is_floating_point and not torch.isfinite(tensor).all():
                raise Damaged(f"{self.path}: the tensor {name} holds values that are not finite")
        if rows(codes) > len(self.tokens):
            raise Damaged(f"{self.path}: it holds more rows than tokens")
        return codes


def save(path: Path, tokens: Tokens[int], codes: Codes, identity: Identity, about: dict[str, Any] | None = None) -> int:
    """Write a session file that only its owner can read, whole or not at all. Returns its bytes."""
    header = asdict(Header(VERSION, list(tokens), identity, about or {}))
    return artefact.write(path, header, codes, private=True)


def copy_prefix(cache: KVCache, pool: BlockPool, tokens: Tokens[int]) -> Copies:
    """A copy of the blocks that hold the longest cached prefix of `tokens`, and of its first raw page."""
    blocks = [index for index, _ in pool.find(tokens)]
    first = pool.edges.find(tokens) if pool.edges is not None and blocks else None
    copies: Copies = []
    for name, store in _stores(cache):
        pages = blocks if FIRST not in name else [] if first is None else [first]
        here = torch.tensor(pages, dtype=torch.int64, device=store.codes.device)
        copies.append((store.codes[here], store.scales[here] if store.scales is not None else None))
    return copies


def paste_prefix(cache: KVCache, pool: BlockPool, tokens: Tokens[int], copies: Copies) -> None:
    """Put copies of the first blocks of `tokens` into free blocks, and of page 0's raw rows into a free raw page, where
    sequences find them as if one had computed them.

    What is cached already stays as it is. If too few blocks are free, the end is left out.
    """
    hits, size, edges = pool.match(tokens), pool.block_size, pool.edges
    whole = min(len(copies[0][0]), pool.prefix_blocks(tokens))
    if whole and edges is not None and not hits and not edges.firsts.free:
        return  # nobody could start on the blocks
    first = edges.take_first() if whole and edges is not None and not hits else None
    new = [pool.take() for _ in range(min(whole - len(hits), len(pool.free)))]
    part = slice(len(hits), len(hits) + len(new))
    try:
        for (name, store), (codes, scales) in zip(_stores(cache), copies, strict=True):
            pages, of = new, part
            if FIRST in name:
                pages, of = ([], slice(0)) if first is None else ([first], slice(1))
            here = torch.tensor(pages, dtype=torch.int64, device=store.codes.device)
            store.codes[here] = codes[of].to(here.device)
            if store.scales is not None and scales is not None:
                store.scales[here] = scales[of].to(here.device)
        parent = hits[-1][1] if hits else None
        for i, index in enumerate(new, len(hits)):
            parent = pool.seal(index, parent, tokens[i * size : (i + 1) * size])
        if edges is not None and first is not None and new:
            edges.seal(first, tokens[:size])
    finally:
        pool.release([*(index for index, _ in hits), *new])
        if edges is not None and first is not None:
            edges.release(first, None)


def to_rows(cache: KVCache, copies: Copies) -> Codes:
    """Blocks as rows, on the CPU. Any thread may do it: nothing of the cache is read but its layouts."""
    codes = {}
    for (name, store), (blocks, scales) in zip(_stores(cache), copies, strict=True):
        every = torch.arange(len(blocks), device=blocks.device)
        codes[f"{name}.codes"] = store.layout.read_rows(blocks, every).cpu().contiguous()
        if scales is not None:
            codes[f"{name}.scales"] = store.scale_layout.read_rows(scales, every)[..., 0].cpu().contiguous()
    return codes


def to_blocks(cache: KVCache, codes: Codes) -> Copies:
    """Rows as blocks of this cache, whole ones, on the CPU. Any thread may do it."""
    longest = rows(codes)

    def laid_out(layout: RowLayout, rows: Tensor) -> Tensor:
        count = min(longest, rows.shape[1]) // layout.block_size
        slots = torch.arange(count * layout.block_size)
        blocks = layout.allocate(count, rows.shape[0], CPU)
        layout.write_rows(blocks, slots, rows[:, : len(slots)].transpose(0, 1))
        return blocks

    copies: Copies = []
    for name, store in _stores(cache):
        blocks, scales = laid_out(store.layout, codes[f"{name}.codes"]), None
        if store.scales is not None:
            scales = laid_out(store.scale_layout, codes[f"{name}.scales"][..., None])
        copies.append((blocks, scales))
    return copies


def rows(codes: Codes) -> int:
    """Tokens that the codes are of."""
    return min((tensor.shape[1] for name, tensor in codes.items() if FIRST not in name), default=0)


def _stores(cache: KVCache) -> Iterator[tuple[str, RowStore]]:
    """Every store once, by the name that its tensors bear. Of the raw ones a session has the first page."""
    for i, layer in cache.owners:
        yield f"layers.{i}.k", layer.k
        yield f"layers.{i}.v", layer.v
        for side, store in zip("kv", layer.raw or (), strict=False):
            yield f"layers.{i}{FIRST}{side}", store


def _kinds(cache: KVCache) -> dict[str, tuple[torch.dtype, int, tuple[int, ...]]]:
    """Of each tensor of a session of this cache: dtype, heads, and what comes after heads and tokens in its shape."""
    kinds: dict[str, tuple[torch.dtype, int, tuple[int, ...]]] = {}
    for name, store in _stores(cache):
        kinds[f"{name}.codes"] = store.codes.dtype, store.heads, (store.codec.width(store.dim),)
        if store.scales is not None:
            kinds[f"{name}.scales"] = store.scales.dtype, store.heads, ()
    return kinds
