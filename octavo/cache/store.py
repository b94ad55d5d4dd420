"""The tensors that hold the codes, and nothing larger: what `nbytes` says is what the cache takes once it is full. On a
CPU a page of it takes memory when it is first written; on a GPU all of it is taken at once.

`KVCache` has one `LayerCache` for each attention layer, `LayerCache` one `RowStore` (row_store.py) for K and one for V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.cache.holding import Held
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerPlan, LayerShape, own_span, reaches
from octavo.cache.row_store import RowStore
from octavo.cache.size import CacheSize
from octavo.cache.states import StatePlan, StatePool
from octavo.quant.format import KVFormat

FIRST = ".first."  # in the names of raw pages, of which a session has the first
Page = tuple[Tensor, Tensor | None]
"""Codes [blocks, heads, …] and scales of one side of one layer, in the layout of its store."""


class LayerCache:
    """K and V of one layer: codes in blocks and, where its format has edges, the edges' rows in raw pages.

    A raw page is a block of the model's own rows, in the same layout. A layer that shares this cache has the same rows
    in hand, but comes when this step's rows are in the ring already.
    """

    def __init__(self, plan: LayerPlan, num_blocks: int, layout: Layout, raw_pages: int = 0):
        shape, self.layout = plan.shape, layout
        self.k, self.v = (
            RowStore(codec, shape.kv_heads, dim, static, layout, side, num_blocks, shape.device)
            for side, codec, dim, static in plan.sides
        )
        self.span = plan.format.edges  # rows; 0: no edges
        self.raw: tuple[RowStore, RowStore] | None = None  # K and V
        if self.span:
            raw_k, raw_v = (
                RowStore(shape.raw_codec, shape.kv_heads, dim, None, layout, side, raw_pages, shape.device)
                for side, _, dim, _ in plan.sides
            )
            self.raw = raw_k, raw_v
        self.native: dict[int, Any] = {}  # what kernels keep of the stores (not of this object), by the id of a spec

    def write(self, k: Tensor, v: Tensor, slots: Tensor, raw_slots: Tensor | None = None) -> None:
        """Encode k [tokens, kv_heads, k_dim] and v [tokens, kv_heads, v_dim] into slots [tokens], and put them into raw
        slots [tokens]."""
        self.k.write(k, slots)
        self.v.write(v, slots)
        if self.raw is not None and raw_slots is not None:
            for store, rows in zip(self.raw, (k, v), strict=True):
                store.write(rows, raw_slots)


@dataclass(frozen=True)
class Memory:
    """Bytes of a cache by what they are for. `padding` is inside `codes`' tensors but stands for no value."""

    codes: int
    scales: int
    padding: int
    static: int
    raw: int = 0
    states: int = 0

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.padding + self.static + self.raw + self.states


class KVCache:
    """The cache of a whole model, made from its layers' plans: so many blocks in every layer, or in those of each group
    (`reaches`), and `raw_pages` raw pages in those with edges (`CacheSize` says how many). For layers that keep states
    it has slots for `sessions` sequences and for `snapshots`."""

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        blocks: int | Sequence[int],
        layout: Layout | None = None,
        raw_pages: int = 0,
        states: StatePlan | None = None,
        sessions: int = 0,
        snapshots: int = 0,
    ):
        self.plans, self.layout = list(plans), layout or Layout()
        self.whole = self.plans  # those with all KV heads, of which this may be a share (octavo/parallel)
        self.reaches = reaches([plan.shape for plan in self.plans])
        self.blocks = [blocks] * len(self.reaches) if isinstance(blocks, int) else list(blocks)  # of each group
        self.group_of: list[int] = []  # by layer
        self.span = own_span([plan.format for plan in self.plans], self.layout.block_size)
        self.raw_pages = raw_pages if self.span else 0
        self.states = StatePool(states, sessions, snapshots) if states else None
        self.layers: list[LayerCache] = []
        for plan in self.plans:
            shares = plan.shape.shares
            group = self.reaches.index(plan.shape.reach) if shares is None else self.group_of[shares]
            count = self.blocks[group]
            own = LayerCache(plan, count, self.layout, self.raw_pages) if shares is None else self.layers[shares]
            self.layers.append(own)
            self.group_of.append(group)

    @property
    def num_blocks(self) -> int:
        """Of group 0, which keeps most."""
        return self.blocks[0]

    def take(self, source: KVCache, group: int, blocks: Tensor, num_blocks: int) -> None:
        """Have `num_blocks` blocks in the layers of a group, of which the first are the blocks [n] of `source`: a cache
        of the same plans and layout, or this one. Store by store, so that no more than one is in memory twice."""
        for (i, mine), (_, theirs) in zip(self.owners, source.owners, strict=True):
            if self.group_of[i] == group:
                mine.k.take(theirs.k, blocks, num_blocks)
                mine.v.take(theirs.v, blocks, num_blocks)
        self.blocks[group] = num_blocks
        self._forget_addresses()

    def stores_of(self, group: int) -> list[RowStore]:
        """Every RowStore of the layers of a group."""
        return [store for i, layer in self.owners if self.group_of[i] == group for store in (layer.k, layer.v)]

    def take_raw(self, source: KVCache, pages: Tensor, raw_pages: int) -> None:
        """As `take`, of raw pages."""
        for mine, theirs in zip(self.raw_stores, source.raw_stores, strict=True):
            mine.take(theirs, pages, raw_pages)
        self.raw_pages = raw_pages
        self._forget_addresses()

    def _forget_addresses(self) -> None:
        for layer in self.layers:
            layer.native.clear()

    @property
    def shapes(self) -> list[LayerShape]:
        return [plan.shape for plan in self.plans]

    @property
    def formats(self) -> list[KVFormat]:
        return [plan.format for plan in self.plans]

    @property
    def size(self) -> CacheSize:
        """What it consists of, computed from the plans."""
        plan, count = (self.states.plan, self.states.snapshots) if self.states is not None else (None, 0)
        return CacheSize.of(self.shapes, self.formats, self.layout.block_size, states=plan, snapshots=count)

    @property
    def owners(self) -> Iterator[tuple[int, LayerCache]]:
        """The layers that have a cache of their own, by number."""
        return ((i, layer) for i, (layer, plan) in enumerate(zip(self.layers, self.plans, strict=True))
                if plan.shape.shares is None)  # fmt: skip

    @property
    def stores(self) -> list[RowStore]:
        """Every RowStore once: shared layers own none."""
        return [store for _, layer in self.owners for store in (layer.k, layer.v)]

    @property
    def raw_stores(self) -> list[RowStore]:
        return [store for _, layer in self.owners for store in layer.raw or ()]

    @property
    def paged_stores(self) -> list[tuple[str, int, RowStore]]:
        """What sessions keep: K and V of every layer with a cache of its own, after each pair that of its raw pages.
        The name that files have each under, its layer, and it."""
        return [
            (f"layers.{i}{of}{side}", i, store)
            for i, layer in self.owners
            for of, pair in ((".", (layer.k, layer.v)), (FIRST, layer.raw or ()))
            for side, store in zip("kv", pair, strict=False)
        ]

    def batch(self, work: Sequence[tuple[Held, int]], newest: Tensor | None = None) -> Batch:
        """The step in which each sequence computes its next n tokens, `newest` as for `Batch.build`."""
        return Batch.build(work, self.layout.block_size, newest, self.span, self.states is not None)

    def read_pages(self, pages: Sequence[Sequence[int]]) -> list[Page]:
        """Copies of blocks, or raw pages, of each of the `paged_stores`."""
        copies: list[Page] = []
        for (_, _, store), own in zip(self.paged_stores, pages, strict=True):
            here = torch.tensor(own, dtype=torch.int64, device=store.codes.device)
            copies.append((store.codes[here], store.scales[here] if store.scales is not None else None))
        return copies

    def write_pages(self, pages: Sequence[Sequence[int]], copies: Sequence[Page]) -> None:
        """Put copies of `read_pages` of such a cache into blocks, or raw pages."""
        for (_, _, store), own, (codes, scales) in zip(self.paged_stores, pages, copies, strict=True):
            here = torch.tensor(own, dtype=torch.int64, device=store.codes.device)
            store.codes[here] = codes.to(here.device)
            if store.scales is not None and scales is not None:
                store.scales[here] = scales.to(here.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks, the raw pages and the states, read from the tensors."""
        return sum(store.nbytes for store in self.stores) + self.raw_nbytes + self.state_nbytes

    @property
    def raw_nbytes(self) -> int:
        return sum(store.nbytes for store in self.raw_stores)

    @property
    def state_nbytes(self) -> int:
        return self.states.nbytes if self.states is not None else 0

    def memory(self) -> Memory:
        """The tensors' bytes: codes, scales, padding of odd 4-bit rows and of layouts, static parts, raw pages and
        states."""
        size = self.layout.block_size
        codes = sum(store.num_blocks * size * store.heads * store.dim * store.codec.bits // 8 for store in self.stores)
        scales = sum(store.scale_nbytes for store in self.stores)
        return Memory(
            codes=codes,
            scales=scales,
            padding=self.nbytes - self.raw_nbytes - self.state_nbytes - codes - scales,
            raw=self.raw_nbytes,
            states=self.state_nbytes,
            static=sum(store.static_nbytes for store in self.stores),
        )

    def counts(self) -> Tensor:
        """int64 [layers, 2, 2], on the host: of K and of V of each layer the values that lay outside the codec's range
        since the start, and all that were written."""
        sides = [(layer.k, layer.v) for layer in self.layers]
        found = [[[int(store.saturated), store.written] for store in side] for side in sides]
        return torch.tensor(found, dtype=torch.int64).view(-1, 2, 2)

    def saturation(self) -> list[tuple[float, float]]:
        """Share of values that lay outside the codec's range since the start, (K, V) of each layer."""
        outside, written = self.counts().double().unbind(-1)
        return [(k, v) for k, v in (outside / written.clamp(min=1)).tolist()]

    def worst_saturation(self) -> tuple[float, str]:
        """The largest of these shares, and where: (0.0012, "V of layer 3")."""
        layers = enumerate(self.saturation())
        shares = ((share, f"{side} of layer {i}") for i, kv in layers for side, share in zip("KV", kv, strict=True))
        return max(shares, default=(0.0, "no layer"))
