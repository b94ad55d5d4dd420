"""A session in a file: the tokens of a conversation and the codes of its K and V, just as they lay in the cache.

The file is an artefact (octavo/artefact.py). Its tensors are the rows of whole blocks, `layers.{i}.{k,v}.codes` [heads,
tokens, width] and, in token formats, `….scales` [heads, tokens], and with edges the raw rows of page 0,
`layers.{i}.first.{k,v}.codes`; in no layout of a device's or kernel's: what one wrote another reads. `rows` [1] is how
many tokens they are of; a layer with a sliding window has the last ones, as far as a query after them sees. Where
layers keep states, `states.{i}.{conv,recurrent}.{j}` are those at the end of these tokens. The header holds the tokens
and what the codes mean. It comes first in the file, so that an incomplete file still has the tokens, from which codes
can be computed again; damaged codes are never used.

The last, partly filled block is left out: its tokens, fewer than a block has, are computed again with what follows.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from octavo import artefact
from octavo.artefact import Artefact, Damaged
from octavo.cache.layout import RowLayout
from octavo.cache.pool import CachePool
from octavo.cache.store import FIRST, KVCache, Page
from octavo.devices import HOST
from octavo.errors import OctavoError

VERSION = 4

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
ROWS = "rows"
STATES = "states."  # what the names of states begin with

Codes = dict[str, Tensor]  # rows, by the names above


@dataclass(frozen=True)
class Copies:
    """The first `count` blocks of a prefix, of layers with a window the last of them, its first raw page, and
    the states at its end."""

    count: int
    stores: list[Page]  # codes and scales of every store, in its own layout
    states: Codes = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """What codes mean. They can be read again only where all of it is equal."""

    model: str  # fingerprint of the weights
    arithmetic: str  # dtype and rotary frequencies that K and V were computed with
    shapes: list[list[int]]  # KV heads, K dim and V dim of each layer that has a cache of its own
    formats: list[str]  # of each such layer
    calibration: str  # digest of mu and c of every layer
    states: list[str] = field(default_factory=list)  # name, shape and type of each

    @classmethod
    def of(cls, cache: KVCache, model: str, arithmetic: str) -> Identity:
        own = [plan for plan in cache.whole if plan.shape.shares is None]
        sides = [static for plan in own for _, _, _, static in plan.sides]
        statics = {
            f"{i}.{name}": getattr(static, name)
            for i, static in enumerate(sides)
            if static is not None
            for name in ("mu", "c")
        }
        return cls(
            model,
            arithmetic,
            [[plan.shape.kv_heads, plan.shape.k_dim, plan.shape.v_dim] for plan in own],
            [str(plan.format) for plan in own],
            artefact.digest_of(statics),
            [f"{name} {list(state.shape)} {state.dtype}" for name, state in _states(cache).items()],
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
        if saved.states != here.states:
            raise OctavoError(f"{self.path}: holds states of other shapes or types than this model keeps; {otherwise}")
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
        count = codes.get(ROWS, torch.empty(0))
        if count.dtype != torch.int64 or count.shape != (1,) or not 0 <= int(count) <= len(self.tokens):
            raise Damaged(f"{self.path}: it does not say of how many of its tokens it holds rows")
        expected = kinds(cache, int(count))
        if codes.keys() != expected.keys():
            strange = sorted(codes.keys() ^ expected.keys())[0]
            raise Damaged(f"{self.path}: the tensor {strange} is {'missing' if strange in expected else 'unknown'}")
        for name, tensor in codes.items():
            dtype, shape = expected[name]
            if tensor.dtype != dtype or tensor.shape != shape:
                raise Damaged(f"{self.path}: the tensor {name} does not have the shape or type of this cache's rows")
            if dtype.is_floating_point and not torch.isfinite(tensor).all():
                raise Damaged(f"{self.path}: the tensor {name} holds values that are not finite")
        return codes


def save(path: Path, tokens: Tokens[int], codes: Codes, identity: Identity, about: dict[str, Any] | None = None) -> int:
    """Write a session file that only its owner can read, whole or not at all. Returns its bytes."""
    header = asdict(Header(VERSION, list(tokens), identity, about or {}))
    return artefact.write(path, header, codes, private=True)


def copy_prefix(cache: KVCache, pool: CachePool, tokens: Tokens[int]) -> Copies:
    """A copy of the blocks that hold the longest cached prefix of `tokens`, of its first raw page and of its states."""
    hit = pool.find(tokens)
    first = pool.edges.find(tokens) if pool.edges is not None and hit else None
    seen = [table[behind:] for table, behind in zip(hit.tables, pool.behinds(len(hit)), strict=True)]
    pages = [
        seen[cache.group_of[i]] if FIRST not in name else [] if first is None else [first]
        for name, i, _ in cache.paged_stores
    ]
    states = pool.states.copies(hit.snapshot) if pool.states is not None else {}
    return Copies(len(hit), cache.read_pages(pages), states)


def paste_prefix(cache: KVCache, pool: CachePool, tokens: Tokens[int], copies: Copies) -> None:
    """Put copies of the first blocks of `tokens` into free blocks, and of page 0's raw rows into a free raw page, where
    sequences find them as if one had computed them.

    What is cached already stays as it is. If too few blocks are free, the end is left out. Of layers with a window
    there are copies of the last blocks alone, and states are those at the end: where these cannot be put at the
    prefix's end, nothing is.
    """
    hit, size, edges = pool.match(tokens), pool.block_size, pool.edges
    whole = min(copies.count, pool.prefix_blocks(tokens))
    if pool.groups[0].reach is None:
        whole = min(whole, len(hit) + len(pool.groups[0].free))
    starts = pool.behinds(copies.count)  # of each group: the first block that is copied, and those to be put
    parts = [range(max(len(hit), behind), whole) for behind in pool.behinds(whole)]
    begins = edges is not None and not hit
    if (
        whole <= len(hit)
        or any(part.start < start for part, start in zip(parts, starts, strict=True))
        or any(len(part) > len(group.free) for part, group in zip(parts, pool.groups, strict=True))
        or (copies.states and whole < copies.count)
        or (begins and edges is not None and not edges.firsts.free)  # nobody could start on the blocks
    ):
        pool.unmatch(hit)
        return
    states, slot = pool.states if copies.states else None, None
    if states is not None and (slot := states.snapshots.take()) is None:
        pool.unmatch(hit)
        return
    first = edges.take_first() if begins and edges is not None else None
    new = [[group.take() for _ in part] for group, part in zip(pool.groups, parts, strict=True)]
    try:
        places: list[list[int]] = []
        put: list[Page] = []
        for (name, i, _), (codes, scales) in zip(cache.paged_stores, copies.stores, strict=True):
            group = cache.group_of[i]
            at, of = new[group], slice(parts[group].start - starts[group], parts[group].stop - starts[group])
            if FIRST in name:
                at, of = ([], slice(0)) if first is None else ([first], slice(1))
            places.append(at)
            put.append((codes[of], None if scales is None else scales[of]))
        cache.write_pages(places, put)
        prefixes = [prefix for prefix, _ in pool.prefixes(tokens)]
        for own, part, pages in zip(pool.groups, parts, new, strict=True):
            for i, index in zip(part, pages, strict=True):
                own.seal(index, prefixes[i - 1] if i else None, tokens[i * size : (i + 1) * size])
        if edges is not None and first is not None:
            edges.seal(first, tokens[:size])
        if states is not None and slot is not None:
            states.paste(slot, copies.states, prefixes[whole - 1], whole * size)
    finally:
        pool.unmatch(hit)
        for own, pages in zip(pool.groups, new, strict=True):
            own.release(pages)
        if edges is not None and first is not None:
            edges.release(first, None)


def to_rows(cache: KVCache, copies: Copies) -> Codes:
    """Blocks as rows, on the CPU. Any thread may do it: nothing of the cache is read but its layouts."""
    codes = {ROWS: torch.tensor([copies.count * cache.layout.block_size])}
    for (name, _, store), (blocks, scales) in zip(cache.paged_stores, copies.stores, strict=True):
        every = torch.arange(len(blocks), device=blocks.device)
        codes[f"{name}.codes"] = store.layout.read_rows(blocks, every).cpu().contiguous()
        if scales is not None:
            codes[f"{name}.scales"] = store.scale_layout.read_rows(scales, every)[..., 0].cpu().contiguous()
    return codes | {name: state.cpu() for name, state in copies.states.items()}


def to_blocks(cache: KVCache, codes: Codes) -> Copies:
    """Rows as blocks of this cache, whole ones, on the CPU. Any thread may do it."""
    size, longest = cache.layout.block_size, rows(codes)

    def laid_out(layout: RowLayout, rows: Tensor) -> Tensor:
        count = min(longest, rows.shape[1]) // size
        slots = torch.arange(count * layout.block_size)
        blocks = layout.allocate(count, rows.shape[0], HOST)
        layout.write_rows(blocks, slots, rows[:, : len(slots)].transpose(0, 1))
        return blocks

    copies = []
    for name, _, store in cache.paged_stores:
        blocks, scales = laid_out(store.layout, codes[f"{name}.codes"]), None
        if store.scales is not None:
            scales = laid_out(store.scale_layout, codes[f"{name}.scales"][..., None])
        copies.append((blocks, scales))
    return Copies(longest // size, copies, {name: codes[name] for name in codes if name.startswith(STATES)})


def rows(codes: Codes) -> int:
    """Tokens that the codes are of."""
    return int(codes[ROWS])


def kinds(cache: KVCache, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Of each tensor of a session of this cache that has `count` rows: dtype and shape."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {ROWS: (torch.int64, (1,))}
    size = cache.layout.block_size
    for name, i, store in cache.paged_stores:
        reach, heads = cache.reaches[cache.group_of[i]], cache.whole[i].shape.kv_heads
        behind = 0 if reach is None else max(0, count - reach + 1) // size * size
        held = min(count, size) if FIRST in name else count - behind
        found[f"{name}.codes"] = store.codes.dtype, (heads, held, store.codec.width(store.dim))
        if store.scales is not None:
            found[f"{name}.scales"] = store.scales.dtype, (heads, held)
    if count:
        found |= {name: (state.dtype, tuple(state.shape)) for name, state in _states(cache).items()}
    return found


def _states(cache: KVCache) -> Codes:
    """By name, as any sequence has them."""
    return cache.states.of(-1) if cache.states is not None else {}
