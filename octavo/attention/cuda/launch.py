"""From a layer and a step to launches: which constants the kernels are compiled for, and how large the grids are.

No grid depends on a value that only the device has, so a step of decodes can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec
from octavo.attention.cuda.codes import FP8
from octavo.attention.cuda.combine import combine
from octavo.attention.cuda.scan import LIFT, scan
from octavo.attention.cuda.step import Step
from octavo.attention.cuda.write import write
from octavo.attention.raw_pages import RawPages
from octavo.cache.batch import Batch
from octavo.cache.row_store import RowStore
from octavo.cache.store import LayerCache
from octavo.quant.codec import TOKEN_LIMIT, TOKEN_RECIPROCAL

LOG2E = math.log2(math.e)
TOKENS = 16  # rows a program of `write` encodes
MOST_SPLITS = 64


def attend(spec: AttentionSpec, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """As `octavo.attention.attend`. Inside torch.compile it is one opaque operator."""
    layer = layer_of(spec, cache)
    step = Step.of(batch)
    one, many = step.tiles(1), step.tiles(layer.chunk.queries)
    edges, hand = edges_of(spec, cache, batch) if cache.raw is not None else ([], [])
    given = (q, k, v, batch.slots, batch.block_table, step.q_start, step.kv_len, one, many, edges, hand)
    if torch.compiler.is_compiling():
        return torch.ops.octavo.attend(*given, layer.memory, layer.number)
    return layer(*given)


class Pages(NamedTuple):
    """Raw pages of K and of V, where each row of the step goes in them, which of them is each sequence's page 0, and in
    which its own span begins. All are None where there are none."""

    k: Tensor | None = None
    v: Tensor | None = None
    slots: Tensor | None = None  # [T]
    first: Tensor | None = None  # [B]
    own: Tensor | None = None  # [B]


def edges_of(spec: AttentionSpec, cache: LayerCache, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """What `Pages` of a step need beside the cache: slots, first and own of the cache's pages, then, if the step has
    chunks, of those in hand; and the latter themselves, with what they hold of earlier steps."""
    assert cache.raw is not None
    edges = list(batch.edges)
    if max(batch.q_lens) == 1:
        return edges, []
    pages = RawPages.of(batch, cache, whole=True)
    earlier = pages.earlier_rows(batch, cache, owner=spec.shape.shares is None)
    hand = [store.codes.new_empty(pages.count, *store.codes.shape[1:]) for store in cache.raw]
    for own, before in zip(hand, earlier, strict=True):
        own[pages.to] = before
    return [*edges, pages.slots, pages.first, pages.hand], hand


@dataclass(frozen=True)
class Tiling:
    """How `scan` reads for decodes, or for chunks. Chosen by reading its machine code, not measured on a GPU."""

    queries: int  # new tokens of a tile
    rows: int  # of a tile, at least queries × query heads of a KV head
    programs: int  # wanted for each multiprocessor: where tiles are fewer, they are split over the context
    shortest: int  # blocks that a split reads at least
    num_warps: int
    num_stages: int

    @classmethod
    def of_decodes(cls, group: int, v: RowStore) -> Tiling:
        """Some six programs run at once; their sums are small. Wide rows of raw V need the registers of four warps, and
        so do tiles of more than 16 query heads, in proportion."""
        rows = max(16, _power(group))
        warps = min(8, rows // 16 * (4 if v.dim * v.codes.itemsize >= 512 else 2))
        return cls(1, rows, programs=16, shortest=2, num_warps=warps, num_stages=3)

    @classmethod
    def of_chunks(cls, group: int, k: RowStore, v: RowStore) -> Tiling:
        """One or two programs run at once; a split's sums in float32 are as long as a few blocks of codes."""
        rows = max(_chunk_rows(k, v), _power(2 * group))
        if rows <= 16:
            return cls(rows // group, rows, programs=4, shortest=8, num_warps=2, num_stages=3)
        wide = 2 * k.layout.block_size * (k.dim * k.codes.itemsize + v.dim * v.codes.itemsize)
        stages = 2 if wide <= _shared_memory(k.codes.device) else 1
        return cls(rows // group, rows, programs=2, shortest=8, num_warps=8, num_stages=stages)

    def splits(self, programs: int, device: torch.device) -> int:
        """Into how many parts contexts are cut where there would be so many programs."""
        return max(1, min(MOST_SPLITS, self.programs * multiprocessors(device) // programs))


class Layer:
    """A layer's constants and launches. Made once, kept by its LayerCache, reachable by number from the operator.

    It holds the cache's stores and not the LayerCache, which would be a cycle: a cache is freed when it is let go.
    """

    def __init__(self, spec: AttentionSpec, cache: LayerCache):
        k, v = cache.k, cache.v
        self.spec, self.k, self.v, self.raw = spec, k, v, cache.raw
        self.number = next(_numbers)
        self.group = spec.heads // k.heads
        widest = cache.raw or (k, v)  # of what a program reads
        self.decode, self.chunk = Tiling.of_decodes(self.group, widest[1]), Tiling.of_chunks(self.group, *widest)
        stores = () if spec.shape.shares is not None else (k, v, *(cache.raw or ()))
        self.memory = [x for s in stores for x in (s.codes, s.scales, s.saturated) if x is not None]
        self.sinks = spec.sinks.float().contiguous() if spec.sinks is not None else None
        shift = k.static is not None and (spec.softcap is not None or spec.sinks is not None or cache.span > 0)
        # A soft cap is softcap·tanh(x) = softcap·(1 − 2/(2^(2x·log2 e) + 1)).
        self.unit = spec.scale * LOG2E * (1 if spec.softcap is None else 2 / spec.softcap)
        self.write: dict[str, Any] = {
            "KV_HEADS": k.heads, "GROUP": self.group, "WRITES": spec.shape.shares is None, "SHIFT": shift,
            "TOKENS": TOKENS, "BLOCK": k.layout.block_size,
        }  # fmt: skip
        self.scan: dict[str, Any] = {
            "KV_HEADS": k.heads, "GROUP": self.group, "BLOCK": k.layout.block_size,
            "SHIFT": shift and spec.softcap is not None, "SOFTCAP": spec.softcap is not None,
            "WINDOW": spec.window is not None, "SPAN": cache.span,
        }  # fmt: skip
        for name, store in (("K", k), ("V", v)):
            codec, dim = store.codec, store.dim
            self.write |= {
                f"{name}_DIM": dim, f"{name}_PADDED": _padded(dim), f"{name}_KIND": codec.kind,
                f"{name}_BITS": codec.bits, f"{name}_ROTATED": codec.rotated,
                f"{name}_STATIC": store.static is not None,
            }  # fmt: skip
            self.scan |= {
                f"{name}_DIM": dim, f"{name}_PADDED": _padded(codec.width(dim)),
                f"{name}_BITS": FP8.value if codec.kind == "float" else codec.bits,
                f"{name}_TOKEN": codec.has_token_scale, f"{name}_RAW_PADDED": _padded(dim),
            }  # fmt: skip
        self.combine: dict[str, Any] = {
            "HEADS": spec.heads, "GROUP": self.group, "DIM": v.dim, "PADDED": _padded(v.dim),
            "SINKS": spec.sinks is not None, "ROTATED": v.codec.rotated, "STATIC": v.static is not None,
            "SHIFT": shift and spec.softcap is None, "EDGES": cache.span > 0,
        }  # fmt: skip

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, table: Tensor, q_start: Tensor, kv_len: Tensor,
        one: Tensor, many: Tensor, edges: list[Tensor], hand: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """Write, then attend. `edges` and `hand` are as `edges_of` returns them."""
        out = q.new_empty(len(q), self.spec.heads, self.v.dim)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        step = (q_start, kv_len, table)
        kept = Pages(*(store.codes for store in self.raw or ()), *edges[:3])
        in_hand = Pages(*hand, *edges[3:])
        with torch.cuda.device_of(q):  # Triton launches on the current device, a model may lie on several
            queries = self._write(q, k, v, slots, kept, in_hand)
            if len(one):
                self._read(q, queries, kept, one, step, out, self.decode)
            if len(many):
                self._read(q, queries, in_hand, many, step, out, self.chunk)
        return out

    def _write(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, kept: Pages, in_hand: Pages
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encode k and v, and fold q: what it is multiplied with [T, heads, parts, k_dim], its factor and its shift
        [T, heads]."""
        K, V = self.k, self.v
        tokens, heads = q.shape[:2]
        if K.codec.kind in ("raw", "float"):
            dtype = K.codes.dtype if K.codes.dtype == q.dtype else torch.float32
            folded = q.new_empty(tokens, heads, 1, K.dim, dtype=dtype)
        else:
            folded = q.new_empty(tokens, heads, 2, K.dim, dtype=torch.int8)
        factor = q.new_empty(tokens, heads, dtype=torch.float32)
        shift = torch.empty_like(factor) if self.write["SHIFT"] else None
        writes = self.write["WRITES"]
        if writes:
            K.written += k.numel()
            V.written += v.numel()
        grid = (-(-tokens // TOKENS), heads + (2 * K.heads if writes or in_hand.slots is not None else 0))
        k_static, v_static = K.static, V.static
        write[grid](
            q, k, v, slots, kept.slots, in_hand.slots, tokens,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            K.codes, K.scales, kept.k, in_hand.k,
            *((k_static.mu, k_static.c, k_static.reciprocal) if k_static else (None,) * 3), *_tables(K), K.saturated,
            V.codes, V.scales, kept.v, in_hand.v,
            *((v_static.mu, v_static.reciprocal) if v_static else (None,) * 2), *_tables(V), V.saturated,
            folded, factor, shift, self.unit, **self.write,
        )  # fmt: skip
        return folded, factor, shift

    def _read(
        self, q: Tensor, queries: tuple[Tensor, Tensor, Tensor | None], pages: Pages, tiles: Tensor,
        step: tuple[Tensor, Tensor, Tensor], out: Tensor, by: Tiling,
    ) -> None:  # fmt: skip
        """Scan and combine `tiles` into their rows of `out`. Raw rows meet q as it is."""
        K, V, spec = self.k, self.v, self.spec
        q_start, kv_len, table = step
        heads = out.shape[1]
        splits = by.splits(len(tiles) * K.heads, out.device)
        parts = splits + (1 if self.raw is not None else 0)
        # By tile and not by row of the step, most of which may be of the other tiles.
        sums = out.new_empty(len(tiles), by.queries, heads, parts, V.dim, dtype=torch.float32)
        tops, totals = (out.new_empty(sums.shape[:-1], dtype=torch.float32) for _ in range(2))
        if pages.k is not None and pages.k.dtype != q.dtype:
            q = q.float()
        scan[(len(tiles), K.heads, parts)](
            *queries, K.codes, K.scales, V.codes, V.scales,
            q, *q.stride()[:2], self.unit, pages.k, pages.v, pages.first, pages.own,
            tiles, q_start, kv_len, table, table.stride(0),
            sums, tops, totals, spec.window or 0, (spec.softcap or 0.0) * LOG2E, splits,
            M=by.rows, QUERIES=by.queries, SHORTEST=by.shortest,
            PRECISION="ieee" if out.dtype == torch.float32 else "tf32",  # tf32 holds float16 and bfloat16 exactly
            V_FLOAT32=V.codec.is_raw and V.codes.dtype != out.dtype,
            RAW_FLOAT32=pages.v is not None and pages.v.dtype != out.dtype,
            RAW_STAGES=min(2, by.num_stages),  # few pages of wide rows: their buffers would keep other programs away
            **self.scan, num_warps=by.num_warps, num_stages=by.num_stages,
        )  # fmt: skip
        # Rows of a program: one with many splits, or enough to fill it where there is nothing to join.
        at_once = 1 if splits > 1 else min(16, _power(by.queries))
        v_static = V.static
        combine[(len(tiles), heads, -(-by.queries // at_once))](
            sums, tops, totals, tiles, q_start, queries[2], self.sinks,
            *((v_static.c, v_static.mu) if v_static else (None, None)), out, LIFT.value, splits,
            QUERIES=by.queries, ROWS=at_once, MOST_SPLITS=MOST_SPLITS if splits > 1 else 1,
            **self.combine,
        )  # fmt: skip


_numbers = count()
_layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()


def layer_of(spec: AttentionSpec, cache: LayerCache) -> Layer:
    if id(spec) not in cache.native:  # the Layer keeps the spec, so its id stays its own
        layer = cache.native[id(spec)] = Layer(spec, cache)
        _layers[layer.number] = layer
    return cache.native[id(spec)]


@torch.library.custom_op("octavo::attend", mutates_args=("hand", "memory"))
def _attend(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, table: Tensor, q_start: Tensor, kv_len: Tensor,
    one: Tensor, many: Tensor, edges: list[Tensor], hand: list[Tensor], memory: list[Tensor], number: int,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return _layers[number](q, k, v, slots, table, q_start, kv_len, one, many, edges, hand)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, table: Tensor, q_start: Tensor, kv_len: Tensor,  # noqa: ARG001
    one: Tensor, many: Tensor, edges: list[Tensor], hand: list[Tensor], memory: list[Tensor], number: int,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _chunk_rows(k: RowStore, v: RowStore) -> int:
    """Queries × query heads of a tile of a chunk: what the registers hold. float32 has no tensor cores."""
    if torch.float32 in (k.codes.dtype, v.codes.dtype):
        return 16
    return 128 if max(k.dim, v.dim) <= 128 else 64


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may take: 99 KiB on compute capability 8.6 and 8.9, 163 on 8.0, 227 on 9.0."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@cache
def _table(table: str, bits: int, device: torch.device) -> Tensor:
    return {"limit": TOKEN_LIMIT, "reciprocal": TOKEN_RECIPROCAL}[table][bits].to(device)


def _tables(store: RowStore) -> tuple[Tensor | None, Tensor | None]:
    if not store.codec.has_token_scale:
        return None, None
    return tuple(_table(name, store.codec.bits, store.codes.device) for name in ("limit", "reciprocal"))  # type: ignore[return-value]


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _padded(width: int) -> int:
    """Columns of a tile: a power of two that the tensor cores take (32 bytes of int8)."""
    return max(32, _power(width))
