"""Attention on codes with the native CPU kernels (native/): the fast counterpart of reference.py.

Where the processor has no bf16 unit, one kernel call computes a whole step in float32, and a row's bits are the same in
any company. Where it has one, that is not the fastest way: sequences with one new token go through a kernel of products
of bytes; for a chunk of many, some heads' codes at a time become a tile of numbers in the query's own type, and torch's
own attention (AMX where there is one) does the rest; the folded formula holds there too. What it returns beside its
output, the logarithm of its denominator, joins the chunk with what came before it, and with a sink. Formats with edges
are float32 everywhere.

The extension may be missing (no compiler when the package was installed): `unavailable()` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octavo import native
from octavo.attention.backend import AttentionSpec, Backend
from octavo.attention.prefill import ChunkPart, capped, flash
from octavo.attention.raw_pages import RawPages
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import SIDES, LayerPlan
from octavo.cache.row_store import RowStore
from octavo.cache.store import LayerCache
from octavo.devices import HOST
from octavo.native import address, expect, in_rows
from octavo.quant.codec import TOKEN_LIMIT, TOKEN_RECIPROCAL, TOKEN_SCALE

TILE_ELEMENTS = 1 << 22  # of the keys and values of a tile, 8 MB in bf16; at least one head's whole context
extension = native.load("octavo.attention._native")
_native = native.functions(extension)
FLOATS = extension.floats

# Whether attention is float32 in one order of sums, so that a row's bits do not depend on its company. Where the
# processor multiplies bf16 and bytes, that is not the fastest way, and done for layers that ask for it.
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
    owner, layer, step = spec.shape.shares is None, _layer(spec, cache), _step(batch, cache)
    out = torch.empty(len(q), spec.heads, cache.v.dim, dtype=q.dtype)
    if exact or spec.exact or cache.raw is not None:
        edges = step.edges.sides(cache, batch, owner) if step.edges is not None else NO_EDGES
        _native.attend(
            _side(cache.k), _side(cache.v), *edges, layer.attention, step.native, owner,
            _rows(q), _rows(k), _rows(v), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if owner:
            for store in (cache.k, cache.v):
                store.written += step.written * store.heads * store.dim
        return out
    if owner:
        write(cache.k, k, batch.slots)
        write(cache.v, v, batch.slots)
    if step.singles:
        _native.decode(
            _side(cache.k), _side(cache.v), layer.attention, step.native, _rows(q), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    for chunk in step.chunks:
        out[chunk.rows] = _attend_chunk(layer, cache, q[chunk.rows], chunk)
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


def read(store: RowStore, heads: slice, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of some heads and blocks [n] as numbers that only the static part separates from x:
    [heads, n·block_size, dim]."""
    count = heads.stop - heads.start
    [start] = _addresses([blocks], [len(blocks)])
    out = torch.empty(count, len(blocks) * store.layout.block_size, store.dim, dtype=dtype)
    _native.read(
        _side(store), heads.start, count, start, len(blocks), FLOATS[dtype], out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def stream(store: RowStore, blocks: Tensor) -> int:
    """Read the codes of blocks [n], which must be there, and nothing else: the yardstick of
    benchmarks/attention_cpu.py."""
    return _native.stream(_side(store), blocks.data_ptr(), len(blocks), torch.get_num_threads())


def _attend_chunk(layer: _Layer, cache: LayerCache, q: Tensor, chunk: _Chunk) -> Tensor:
    """One sequence with many new tokens: q [n, heads, k_dim] → [n, heads, v_dim] in float32.

    bf16 queries meet tiles in bf16, which holds every int8 code exactly (and others rounded); others meet float32, and
    so do those with a soft cap, which torch's attention does not know.
    """
    spec, sinks = layer.spec, layer.sinks
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 and spec.softcap is None else torch.float32
    blocks, parts = chunk.seen(spec.window)

    expect(q.shape[1:] == (spec.heads, cache.k.dim), "queries of as many heads as the layer has")
    q = q.unflatten(1, (cache.k.heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, n, k_dim]
    folded = torch.tensor(spec.scale, dtype=torch.float32)
    shift = torch.zeros(
        q.shape[:3], dtype=torch.float32
    )  # q·mu is the same for every key: a soft cap and a sink see it
    if cache.k.static is not None:
        folded = folded * cache.k.static.c[:, None, None]
        if spec.softcap is not None or sinks is not None:
            shift = torch.einsum("hgnd,hd->hgn", q.float(), cache.k.static.mu * spec.scale)
    query = (q.float() * folded).to(dtype)

    packed = torch.empty(q.shape[2], *q.shape[:2], cache.v.dim, dtype=torch.float32)
    out = packed.permute(1, 2, 0, 3)
    total = torch.empty(q.shape[:3], dtype=torch.float32)  # log Σ exp(score) of what was seen
    together = max(1, TILE_ELEMENTS // (len(blocks) * _native.BLOCK * (cache.k.dim + cache.v.dim)))
    for head in range(0, cache.k.heads, together):
        heads = slice(head, min(head + together, cache.k.heads))
        keys, values = read(cache.k, heads, blocks, dtype), read(cache.v, heads, blocks, dtype)
        for part in parts:
            tile = query[heads, :, part.rows], keys[:, part.keys], values[:, part.keys], shift[heads, :, part.rows]
            some = flash(*tile, part) if spec.softcap is None else capped(*tile, part, spec.softcap)
            part.put(*some, out[heads, :, part.rows], total[heads, :, part.rows])
    weight = torch.ones((), dtype=torch.float32)  # every query sees itself
    if sinks is not None:
        weight = (total - sinks.view(cache.k.heads, -1, 1)).sigmoid_()[..., None]
        out *= weight
    if cache.v.static is not None:
        out.mul_(cache.v.static.c[:, None, None]).add_(weight * cache.v.static.mu[:, None, None])
    return packed.flatten(1, 2)


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


class _Chunk:
    """A sequence with many new tokens. What layers of one window need of it is made once for all of them."""

    def __init__(self, rows: slice, kv_len: int, table: Tensor):
        self.rows, self.kv_len, self.table = rows, kv_len, table
        self.by_window: dict[int | None, tuple[Tensor, list[ChunkPart]]] = {}

    def seen(self, window: int | None) -> tuple[Tensor, list[ChunkPart]]:
        """The blocks [n] that its queries see, and its parts among the tokens of those blocks."""
        if window not in self.by_window:
            n, size = self.rows.stop - self.rows.start, _native.BLOCK
            first = 0 if window is None else max(0, self.kv_len - n + 1 - window) // size
            blocks = self.table[first : -(-self.kv_len // size)]
            self.by_window[window] = blocks, ChunkPart.of_chunk(n, self.kv_len - first * size, window)
        return self.by_window[window]


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
        self.singles = 1 in batch.q_lens
        starts = batch.q_start
        # However short, a piece of a prompt is a chunk: prompts are computed alike however they are cut.
        self.chunks = [
            _Chunk(slice(int(starts[i]), int(starts[i + 1])), kv_len, batch.block_table[i])
            for i, (n, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True))
            if n > 1
        ]


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
