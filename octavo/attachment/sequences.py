"""The sequences of a batch in a cache that grows with them. They can be forked, cropped and put in another order.

Blocks are shared where sequences are copies of each other, until one writes into a shared block: it then gets a copy of
its own. Raw pages are few, so each sequence has its own, by its place in the batch:

    ring    span/block_size pages: rows of its own span          first   page 0
    before  as many pages as the ring: the span before its own, kept while the past is recorded

A crop may lead back into the span before, whose raw rows the ring has lost. If it was recorded it is put back, and the
cache is as if the removed rows had never been there. If not, the ring gets what the codes stand for.

Layers whose queries see equally far back are a group with blocks of its own, as in the engine. Blocks behind a window
are given back when the next step begins; while the past is recorded, when the next crop says that no step back comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.cache.blocks import BlockPool
from octavo.cache.holding import Held
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerPlan
from octavo.cache.store import KVCache, LayerCache
from octavo.errors import OctavoError

SMALL = 8  # blocks: a memory of so few is left as it is


@dataclass(eq=False, kw_only=True)
class Row(Held):
    """A sequence, as a batch is built of it. It has as many `tokens` as there are once the step is done; which they
    are only the model knows."""

    before: int | None = None  # the number of the span that is recorded


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
        self.pools = [BlockPool(0, layout.block_size, False, reach) for reach in self.cache.reaches]
        self.rows: list[Row] = []
        self.span, self.size = self.cache.span, layout.block_size
        self.records = False
        self.recording: Recording | None = None  # of this step

    def begin(self, counts: Sequence[int]) -> Batch | None:
        """The step in which sequence i writes counts[i] rows; None if none writes any. A step that was begun and not
        committed has changed nothing, unless it `overwrites`."""
        work = []
        for row, count in zip(self.rows, counts, strict=True):
            row.tokens = range(row.num_cached + count)
            self._cut(row)  # of a step that failed
            if not self.records:
                self._let_go(row)
            if count:
                work.append((row, count))
        if not work:
            return None
        for group in range(len(self.pools)):
            self._take_blocks(group, [row for row, _ in work])
        if self.span:
            self.recording = self._record(work) if self.records else None
        return self.cache.batch(work)

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
            own, after = self._spans(row)
            if after > own:
                row.before = after - 1 if self.records else None
            row.num_cached = len(row.tokens)

    def select(self, indices: Sequence[int]) -> None:
        """The sequences of these numbers, in their order, each as often as it is named."""
        rows = [deepcopy(self.rows[i]) for i in indices]
        for row in rows:
            for pool, table, behind in zip(self.pools, row.tables, row.behind, strict=True):
                pool.share(table[behind:])
        self._drop_all()
        self.rows = rows
        self._arrange_pages(indices, self.pages_each)

    def start(self, count: int) -> None:
        """Have `count` sequences without rows."""
        self._drop_all()
        self.rows = [Row(tables=[[] for _ in self.pools], behind=[0] * len(self.pools)) for _ in range(count)]
        self._arrange_pages([], self.pages_each)

    def crop(self, counts: Sequence[int]) -> None:
        """Take the last counts[i] rows from sequence i. Raises OctavoError, and takes none, where a window then reaches
        into blocks that were given back."""
        for row, count in zip(self.rows, counts, strict=True):
            for pool, behind in zip(self.pools, row.behind, strict=True):
                if behind > pool.behind(row.num_cached - count):
                    raise OctavoError(
                        f"{count} tokens cannot be taken back: layers with a window of {pool.reach} have lost what came"
                        " before; call activate_past_recording() first, as assisted decoding does"
                    )
        for row, count in zip(self.rows, counts, strict=True):
            after = row.num_cached - count
            own = self._span_of(after)
            if own < self._span_of(row.num_cached) and after > self.size:
                self._restore(row, own, after)
            row.num_cached = after
            self._cut(row)
            self._let_go(row)

    def record_past(self) -> None:
        """From now on keep the span before each sequence's own, so that a crop finds it."""
        if self.span and not self.records:
            before = self.pages_each
            self.records = True
            self._arrange_pages(range(len(self.rows)), before)

    def copy(self) -> Sequences:
        """The same sequences in a cache of their own."""
        other = Sequences(self.cache.plans, self.cache.layout)
        other.pools, other.rows, other.records = deepcopy(self.pools), deepcopy(self.rows), self.records
        for group, pool in enumerate(self.pools):
            other.cache.take(self.cache, group, torch.arange(len(pool)), len(pool))
        if self.span:
            other.cache.take_raw(self.cache, torch.arange(self.cache.raw_pages), self.cache.raw_pages)
        return other

    @property
    def overwrites(self) -> bool:
        """Whether the step that was begun writes a new span over one that had rows."""
        return any(own < after for own, after in (self._spans(row) for row in self.rows if row.num_cached))

    @property
    def pages_each(self) -> int:
        """Raw pages of a sequence."""
        ring = self.span // self.size
        return (2 * ring if self.records else ring) + 1 if self.span else 0

    def _span_of(self, rows: int) -> int:
        """The number of the own span of a sequence of so many rows."""
        return max(0, rows - 1) // self.span if self.span else 0

    def _spans(self, row: Row) -> tuple[int, int]:
        """The numbers of its own span before the step and after it."""
        return self._span_of(row.num_cached), self._span_of(len(row.tokens))

    def _ring(self, page: int) -> range:
        return range(page, page + self.span // self.size)

    def _cut(self, row: Row) -> None:
        """Give back the blocks after its rows."""
        for pool, table in zip(self.pools, row.tables, strict=True):
            held = pool.blocks_for(row.num_cached)
            pool.release(table[held:])
            del table[held:]

    def _let_go(self, row: Row) -> None:
        """Give back the blocks that no later query sees."""
        for group, (pool, table) in enumerate(zip(self.pools, row.tables, strict=True)):
            row.behind[group] = pool.let_go(table, row.behind[group], row.num_cached)

    def _drop_all(self) -> None:
        """Give back all blocks of all sequences."""
        for row in self.rows:
            for pool, table, behind in zip(self.pools, row.tables, row.behind, strict=True):
                pool.release(table[behind:])

    def _take_blocks(self, group: int, rows: Sequence[Row]) -> None:
        """Blocks for the rows of a step; a block that is written to is its sequence's alone."""
        pool = self.pools[group]
        tables = [row.tables[group] for row in rows]
        written = [table for row, table in zip(rows, tables, strict=True) if row.num_cached % self.size]
        shared = [table for table in written if pool.blocks[table[-1]].references > 1]
        needs = [pool.blocks_for(len(row.tokens)) - len(table) for row, table in zip(rows, tables, strict=True)]
        pool = self._fit(group, len(shared) + sum(needs))
        copied = []
        for table in shared:
            old = table[-1]
            if pool.blocks[old].references > 1:  # the last one that has it keeps it
                table[-1] = pool.take()
                copied.append((old, table[-1]))
                pool.release([old])
        if copied:
            blocks, to = torch.tensor(copied).unbind(1)
            for store in self.cache.stores_of(group):
                store.copy_blocks(blocks, to)
        for table, count in zip(tables, needs, strict=True):
            table += [pool.take() for _ in range(count)]

    def _fit(self, group: int, needed: int) -> BlockPool:
        """The pool, with at least `needed` blocks free. Memory grows by a quarter at a time. Where more than half of it
        would stay free, as after a prompt much longer than a window, it shrinks to a quarter more than is used."""
        pool = self.pools[group]
        want = (pool.used + needed) * 5 // 4
        if len(pool.free) < needed:
            self.cache.take(self.cache, group, torch.arange(len(pool)), want)
            pool.grow(want - len(pool))
        elif pool.reach is not None and len(pool) > 2 * max(want, SMALL):
            self._move(group, max(want, SMALL))
        return self.pools[group]

    def _move(self, group: int, num_blocks: int) -> None:
        """Have the blocks in use at the begin of a memory of `num_blocks`."""
        old, new = self.pools[group], BlockPool(num_blocks, self.size, False, self.pools[group].reach)
        used = [i for i, block in enumerate(old.blocks) if block.references]
        place = {block: new.take() for block in used}
        for block in used:
            new.blocks[place[block]].references = old.blocks[block].references
        for row in self.rows:
            table, behind = row.tables[group], row.behind[group]
            table[behind:] = [place[block] for block in table[behind:]]
        self.cache.take(self.cache, group, torch.tensor(used, dtype=torch.int64), num_blocks)
        self.pools[group] = new

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
            own, after = self._spans(row)
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
            for i, layer in self.cache.owners:
                group = self.cache.group_of[i]
                first = max(span * self.span // self.size, row.behind[group])  # what is not there nobody sees
                blocks = torch.tensor(row.tables[group][first : self.pools[group].blocks_for(length)])
                positions = torch.arange(first * self.size, length)
                slots = row.ring * self.size + positions % self.span
                for store, raw in zip((layer.k, layer.v), layer.raw or (), strict=True):
                    rows = store.decode(blocks.to(store.codes.device))[: len(positions)]
                    raw.write(rows, slots.to(rows.device))
        row.before = None
