"""Attention on codes with the native CPU kernels (native/): the fast counterpart of reference.py.

One kernel call writes a step's rows and computes all its attention, in float32, where a row's bits are the same in any
company. Where the processor has products of bytes and bf16, sequences with one new token take those of bytes, with
queries and weights rounded to 15 and 16 bits, which halves their time; what is then computed for a row depends on
whether its sequence has others in the step.

The extension may be missing (no compiler when the package was installed): `unavailable()` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octavo import native
from octavo.attention.backend import AttentionSpec, Backend
from octavo.attention.raw_pages import RawPages
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import SIDES, LayerPlan
from octavo.cache.row_store import RowStore
from octavo.cache.store import LayerCache
from octavo.devices import HOST
from octavo.native import address, expect, in_rows
from octavo.quant.codec import TOKEN_LIMIT, TOKEN_RECIPROCAL, TOKEN_SCALE

extension = native.load("octavo.attention._native")
_native = native.functions(extension)
FLOATS = extension.floats

# Whether no layer multiplies bytes. Those that ask for exact sums never do.
exact = not extension.has_bf16


def unavailable() -> str | None:
    """Why the kernels cannot be used here; None if they can."""
    return extension.unavailable


def isa() -> str:
    """The instruction set of the kernels."""
    return _native.isa()


def refuses(plan: LayerPlan) -> str | None:
    """Why the kernels cannot read such a layer; they have every codec."""
    shape = plan.shape
    if (why := unavailable()) is not None:
        return why
    if shape.device.type != "cpu":
        return f"the cache is on {shape.device}"
    if shape.k_dim % 8 or shape.v_dim % 8 or max(shape.k_dim, shape.v_dim) > _native.LARGEST:
        return f"no kernel takes heads of {shape.k_dim} and {shape.v_dim}"
    return None


def attend(spec: AttentionSpec, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """As `octavo.attention.attend`."""
    q, k, v = map(in_rows, (q, k, v))
    owner, step = spec.shape.shares is None, _step(batch, cache)
    out = torch.empty(len(q), spec.heads, cache.v.dim, dtype=q.dtype)
    edges = step.edges.sides(cache, batch, owner) if step.edges is not None else NO_EDGES
    _native.attend(
        _side(cache.k), _side(cache.v), *edges, _layer(spec, cache).attention, step.native, owner,
        _rows(q), _rows(k), _rows(v), out.data_ptr(), not (exact or spec.exact), torch.get_num_threads(),
    )  # fmt: skip
    if owner:
        for store in (cache.k, cache.v):
            store.written += step.written * store.heads * store.dim
    return out


def _rows(x: Tensor) -> tuple[int, ...]:
    """Rows [tokens, heads, dim] as the kernels take them, which check their shape."""
    return x.data_ptr(), FLOATS[x.dtype], *x.shape, x.stride(0), x.stride(1)


def _addresses(numbers: Sequence[Tensor], lengths: Sequence[int]) -> list[int]:
    """Of tensors of numbers that say where something lies; the kernels see that it is there."""
    for x, length in zip(numbers, lengths, strict=True):
        right = x.dtype == torch.int64 and x.is_contiguous() and x.device == HOST and len(x) == length
        expect(right, "contiguous int64 numbers in the host's memory, as many as the step has sequences or rows")
    return [x.data_ptr() for x in numbers]


def write(store: RowStore, x: Tensor, slots: Tensor) -> None:
    """As `RowStore.write`."""
    x = in_rows(x)
    [to] = _addresses([slots], [len(x)])
    tokens = _native.write(_side(store), _rows(x), to, len(x), torch.get_num_threads())
    store.written += tokens * store.heads * store.dim


def stream(store: RowStore, blocks: Tensor) -> int:
    """Read the codes of blocks [n], which must be there, and nothing else: the yardstick of
    benchmarks/attention_cpu.py."""
    return _native.stream(_side(store), blocks.data_ptr(), len(blocks), torch.get_num_threads())


class _Layer:
    """What the kernels need to know of a layer beside its cache, made once."""

    def __init__(self, spec: AttentionSpec):
        self.spec = spec
        self.sinks = spec.sinks.float().contiguous() if spec.sinks is not None else None
        expect(self.sinks is None or self.sinks.shape == (spec.heads,), "a sink of each head")
        self.attention = _native.Attention(
            spec.heads, spec.scale, spec.window or 0, spec.softcap or 0.0, address(self.sinks)
        )


def _layer(spec: AttentionSpec, cache: LayerCache) -> _Layer:
    if id(spec) not in cache.native:  # the _Layer keeps the spec, so its id stays its own
        cache.native[id(spec)] = _Layer(spec)
    return cache.native[id(spec)]


class _Step:
    """What the kernels need to know of a step, made once and kept for all layers."""

    def __init__(self, batch: Batch, cache: LayerCache):
        self.edges = _Edges(batch, cache) if cache.raw is not None else None
        self.keep = batch.q_start, batch.kv_len, batch.block_table, batch.slots  # as long as their addresses
        sequences, rows = len(batch.q_lens), sum(batch.q_lens)
        q_start, kv_len, table, slots = _addresses(self.keep, (sequences + 1, sequences, sequences, rows))
        edges = self.edges.addresses if self.edges is not None else [0] * 6
        self.native = _native.Plan(sequences, q_start, kv_len, table, batch.block_table.shape[1], slots, *edges)
        self.written = 0 if batch.fixed else int((batch.slots >= 0).sum())  # rows


def _step(batch: Batch, cache: LayerCache) -> _Step:
    name = "native", cache.raw is not None  # formats of layers may differ: some have edges
    if name not in batch.plan:
        batch.plan[name] = _Step(batch, cache)
    return batch.plan[name]


Sides = tuple[Any, Any, Any, Any]  # the kernels' views of raw pages: K and V of the cache, K and V in hand
NO_EDGES: Sides = (None,) * 4


class _Edges:
    """Raw pages of a step: which hold what its queries read, and where its own rows go."""

    def __init__(self, batch: Batch, cache: LayerCache):
        self.pages = pages = RawPages.of(batch, cache)
        raw_slots, first, ring = batch.edges
        self.keep = first, ring, raw_slots, pages.hand, pages.slots  # as long as their addresses
        sequences, rows = len(batch.q_lens), sum(batch.q_lens)
        self.addresses = [cache.span, *_addresses(self.keep, (sequences, sequences, rows, sequences, rows))]
        self.hand: dict[tuple[Any, ...], list[RowStore]] = {}  # pages in hand, of layers of one shape

    def sides(self, cache: LayerCache, batch: Batch, owner: bool) -> Sides:
        """Those of a layer. Pages in hand have the rows of earlier steps already."""
        assert cache.raw is not None
        raw_k, raw_v = map(_side, cache.raw)
        if not self.pages.count:
            return raw_k, raw_v, None, None
        shape = tuple((store.codec, store.heads, store.dim) for store in cache.raw)
        if shape not in self.hand:  # one layer at a time needs them
            self.hand[shape] = [
                RowStore(store.codec, store.heads, store.dim, None, cache.layout, side, self.pages.count, HOST)
                for store, side in zip(cache.raw, SIDES, strict=True)
            ]
        hand = self.hand[shape]
        for store, before in zip(hand, self.pages.earlier_rows(batch, cache, owner), strict=True):
            store.codes[self.pages.to] = before
        return raw_k, raw_v, *map(_side, hand)


def _side(store: RowStore) -> Any:
    """The kernel's view of a store, made once: the tensors it points to live as long as the store."""
    if store.native is None:
        if store.layout.block_size != _native.BLOCK:
            raise ValueError(f"blocks of {store.layout.block_size} tokens; the native kernels have {_native.BLOCK}")
        codec, static = store.codec, store.static
        if static is not None:
            for x in (static.mu, static.c, static.reciprocal):
                expect(x.shape == (store.heads, store.dim) and x.is_contiguous(), "a static part [heads, dim]")
        tables: list[Tensor | None] = [None] * 3
        if codec.has_token_scale:
            tables = [table[codec.bits] for table in (TOKEN_SCALE, TOKEN_RECIPROCAL, TOKEN_LIMIT)]
        store.native = _native.side(
            _native.CODES["float8_e4m3fn" if codec.kind == "float" else codec.dtype],
            store.heads,
            store.dim,
            store.layout.order in ("k-tiles", "columns"),
            codec.rotated,
            store.codes.data_ptr(),
            address(store.scales),
            *(address(x) for x in ((static.mu, static.c, static.reciprocal) if static else (None,) * 3)),
            *(address(table) for table in tables),
            store.codes[0, 0].nbytes,
            store.saturated.data_ptr(),
            store.num_blocks,
        )
    return store.native


BACKEND = Backend("native", Layout(order="tiles"), attend, refuses, recordable=True)
