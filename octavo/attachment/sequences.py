"""The sequences of a batch in a cache that grows with them. They can be forked, cropped and put in another order.

Blocks are shared where sequences are copies of each other, until one writes into a shared block: it then gets a copy of
its own. Raw pages are few, so each sequence has its own, by its place in the batch:

    ring    span/block_size pages: rows of its own span          first   page 0
    before  as many pages as the ring: the span before its own, kept while the past is recorded

A crop may lead back into the span before, whose raw rows the ring has lost. If it was recorded it is put back, and the
cache is as if the removed rows had never been there. If not, the ring gets what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.cache.blocks import BlockPool
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerPlan
from octavo.cache.store import KVCache, LayerCache


@dataclass(eq=False)
class Row:
    """A sequence, as a batch is built of it."""

    first_page: int = -1
    ring: int = -1
    state_slot: int | None = None
    before: int | None = None  # the number of the span that is recorded
    num_cached: int = 0
    num_new: int = 0

    def __post_init__(self) -> None:
        self.block_table: list[int] = []

    @property
    def tables(self) -> list[list[int]]:
        """One for all layers: what lies behind a window stays."""
        return [self.block_table]

    @property
    def tokens(self) -> Sequence[int]:
        """As many as there are once the step is done. Which they are only the model knows."""
        return range(self.num_cached + self.num_new)


@dataclass
class Recording:
    """What a step that begins a new span does first, in every layer: pages `moved` go to pages `to`, and rows in hand
    to `slots` [T]."""

    moved: Tensor
    to: Tensor
    slots: Tensor


class Sequences:
    """Some sequences and the cache that holds them."""

    def __init__(self, plans: Sequence[LayerPlan], layout: Layout):
        self.cache = KVCache(plans, 0, layout)
        self.pool = BlockPool(0, layout.block_size, prefix_caching=False)
        self.rows: list[Row] = []
        self.span, self.size = self.cache.span, layout.block_size
        self.records = False
        self.recording: Recording | None = None  # of this step

    def begin(self, counts: Sequence[int]) -> Batch | None:
        """The step in which sequence i writes counts[i] rows; None if none writes any. A step that was begun and not
        committed has changed nothing."""
        work = []
        for row, count in zip(self.rows, counts, strict=True):
            row.num_new = count
            held = self.pool.blocks_for(row.num_cached)
            self.pool.release(row.block_table[held:])  # of a step that failed
            del row.block_table[held:]
            if count:
                work.append((row, count))
        if not work:
            return None
        self._take_blocks([row for row, _ in work])
        if self.span:
            self.recording = self._record(work) if self.records else None
        return Batch.build(work, self.size, span=self.span)

    def record(self, layer: LayerCache, k: Tensor, v: Tensor) -> None:
        """Keep what this step would overwrite: before it attends, with its rows k and v [T, kv_heads, dim]."""
        if self.recording is None or layer.raw is None:
            return
        for store, x in zip(layer.raw, (k, v), strict=True):
            store.copy_blocks(self.recording.moved, self.recording.to)
            store.write(x, self.recording.slots.to(x.device))

    def commit(self) -> None:
        """The rows of the step are in the cache."""
        for row in self.rows:
            own, after = self._span_of(row.num_cached), self._span_of(row.num_cached + row.num_new)
            if after > own:
                row.before = after - 1 if self.records else None
            row.num_cached += row.num_new
            row.num_new = 0

    def select(self, indices: Sequence[int]) -> None:
        """The sequences of these numbers, in their order, each as often as it is named."""
        rows = [deepcopy(self.rows[i]) for i in indices]
        for row in rows:
            self.pool.share(row.block_table)
        for row in self.rows:
            self.pool.release(row.block_table)
        self.rows = rows
        self._arrange_pages(indices, self.pages_each)

    def start(self, count: int) -> None:
        """Have `count` sequences without rows."""
        for row in self.rows:
            self.pool.release(row.block_table)
        self.rows = [Row() for _ in range(count)]
        self._arrange_pages([], self.pages_each)

    def crop(self, counts: Sequence[int]) -> None:
        """Take the last counts[i] rows from sequence i."""
        for row, count in zip(self.rows, counts, strict=True):
            after = row.num_cached - count
            own = self._span_of(after)
            if own < self._span_of(row.num_cached) and after > self.size:
                self._restore(row, own, after)
            row.num_cached = after
            held = self.pool.blocks_for(after)
            self.pool.release(row.block_table[held:])
            del row.block_table[held:]

    def record_past(self) -> None:
        """From now on keep the span before each sequence's own, so that a crop finds it."""
        if self.span and not self.records:
            before = self.pages_each
            self.records = True
            self._arrange_pages(range(len(self.rows)), before)

    def copy(self) -> Sequences:
        """The same sequences in a cache of their own."""
        other = Sequences(self.cache.plans, self.cache.layout)
        other.pool, other.rows, other.records = deepcopy(self.pool), deepcopy(self.rows), self.records
        other.cache.take(self.cache, torch.arange(self.cache.num_blocks), self.cache.num_blocks)
        if self.span:
            other.cache.take_raw(self.cache, torch.arange(self.cache.raw_pages), self.cache.raw_pages)
        return other

    @property
    def pages_each(self) -> int:
        """Raw pages of a sequence."""
        ring = self.span // self.size
        return (2 * ring if self.records else ring) + 1 if self.span else 0

    def _span_of(self, rows: int) -> int:
        """The number of the own span of a sequence of so many rows."""
        return max(0, rows - 1) // self.span if self.span else 0

    def _ring(self, page: int) -> range:
        return range(page, page + self.span // self.size)

    def _take_blocks(self, rows: Sequence[Row]) -> None:
        """Blocks for the rows of a step; a block that is written to is its sequence's alone."""
        shared = [
            row for row in rows if row.num_cached % self.size and self.pool.blocks[row.block_table[-1]].references > 1
        ]
        needs = {row: self.pool.blocks_for(len(row.tokens)) - len(row.block_table) for row in rows}
        missing = len(shared) + sum(needs.values()) - len(self.pool.free)
        if missing > 0:
            self._grow(max(missing, len(self.pool) // 4))
        copied = []
        for row in shared:
            old = row.block_table[-1]
            if self.pool.blocks[old].references > 1:  # the last one that has it keeps it
                row.block_table[-1] = self.pool.take()
                copied.append((old, row.block_table[-1]))
                self.pool.release([old])
        if copied:
            blocks, to = torch.tensor(copied).unbind(1)
            for store in self.cache.stores:
                store.copy_blocks(blocks, to)
        for row, count in needs.items():
            row.block_table += [self.pool.take() for _ in range(count)]

    def _grow(self, count: int) -> None:
        self.cache.take(self.cache, torch.arange(len(self.pool)), len(self.pool) + count)
        self.pool.grow(count)

    def _arrange_pages(self, sources: Sequence[int], pages_before: int) -> None:
        """Each row's raw pages, at its place. Row i has what sequence sources[i] had, in `pages_before` pages."""
        each, ring = self.pages_each, self.span // self.size
        if not each:
            return
        for i, row in enumerate(self.rows):
            row.ring, row.first_page = i * each, i * each + ring
        pages = [source * pages_before + min(page, pages_before - 1) for source in sources for page in range(each)]
        self.cache.take_raw(self.cache, torch.tensor(pages, dtype=torch.int64), len(self.rows) * each)

    def _record(self, work: Sequence[tuple[Row, int]]) -> Recording | None:
        """What this step does to keep the span before the one in which it ends."""
        moved: list[int] = []
        to: list[int] = []
        slots = torch.full((sum(count for _, count in work),), -1)
        start = 0
        for row, count in work:
            own, after = self._span_of(row.num_cached), self._span_of(row.num_cached + count)
            if after > own:
                kept = row.first_page + 1
                if own == after - 1:
                    moved += self._ring(row.ring)
                    to += self._ring(kept)
                positions = torch.arange(row.num_cached, row.num_cached + count)
                places = kept * self.size + positions % self.span
                slots[start : start + count] = torch.where(positions // self.span == after - 1, places, -1)
            start += count
        return Recording(torch.tensor(moved, dtype=torch.int64), torch.tensor(to, dtype=torch.int64), slots)

    def _restore(self, row: Row, span: int, length: int) -> None:
        """Have the raw rows of that span, up to `length`, in the ring again."""
        if row.before == span:
            ring, kept = torch.tensor(self._ring(row.ring)), torch.tensor(self._ring(row.first_page + 1))
            for store in self.cache.raw_stores:
                store.copy_blocks(kept, ring)
        else:
            start = span * self.span
            blocks = torch.tensor(row.block_table[start // self.size : self.pool.blocks_for(length)])
            slots = row.ring * self.size + torch.arange(length - start)
            for _, layer in self.cache.owners:
                for store, raw in zip((layer.k, layer.v), layer.raw or (), strict=True):
                    rows = store.decode(blocks.to(store.codes.device))[: length - start]
                    raw.write(rows, slots.to(rows.device))
        row.before = None
