"""Raw pages of a step, where a format has edges: which of them hold the rows that its queries read.

A query reads raw the rows of page 0 and those of its own span. Page 0, and the own span of a sequence with one new
token, are in the cache once the step's rows are written. The own spans of a chunk's queries begin before the step or in
it: the chunk's rows, and earlier ones of its first span, are laid out in pages that live as long as the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.cache.store import LayerCache
from octavo.devices import send


class RawPages:
    """Which pages, the same for all layers. With `whole` the pages in hand are all that a chunk reads, page 0 too.

    Made from the lengths that the host knows; the host waits for nothing that the device knows.
    """

    @classmethod
    def of(cls, batch: Batch, cache: LayerCache, whole: bool = False) -> RawPages:
        """Those of a step, made once."""
        if "raw pages" not in batch.plan:
            batch.plan["raw pages"] = cls(batch, cache.span, cache.layout.block_size, whole)
        return batch.plan["raw pages"]

    def __init__(self, batch: Batch, span: int, size: int, whole: bool = False):
        _, first, ring = batch.edges
        hand = torch.full((2, len(batch.q_lens)), -1)
        slots = torch.full((len(batch.ids),), -1)
        self.count = 0  # pages in hand
        ring_pages, page_0 = span // size, -1
        earlier: list[tuple[int, int, int]] = []  # a sequence, page_0 or a page of its ring, and where it goes
        row = 0
        for i, (n, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
            begin = kv_len - n
            if n > 1:
                origin = begin // span * ring_pages  # the page where its own span begins
                hand[0, i] = self.count
                if whole and origin:
                    earlier.append((i, page_0, self.count))
                    self.count += 1
                hand[1, i] = self.count
                at = torch.arange(begin - origin * size, kv_len - origin * size)
                slots[row : row + n] = self.count * size + at
                # The cache itself has all rows of page 0.
                earlier += [(i, page % ring_pages if page else page_0, self.count + page - origin)
                            for page in range(origin if whole else max(origin, 1), -(-begin // size))]  # fmt: skip
                self.count += -(-kv_len // size) - origin
            row += n
        device = ring.device
        # [B] page 0 in hand, and the first page in hand of the own span; −1: it has none.
        self.first, self.hand = send(hand, device)
        self.slots = send(slots, device)  # [T] of new rows in hand
        of, page, self.to = send(torch.tensor(earlier, dtype=torch.int64).view(-1, 3), device).unbind(1)
        # Pages of the cache, and the pages in hand where their rows go.
        self.earlier = torch.where(page == page_0, first[of], ring[of] + page)

    def earlier_rows(self, batch: Batch, cache: LayerCache, owner: bool) -> list[Tensor]:
        """What the `earlier` pages of K and of V hold. The owner of the cache asks before the step's own rows take
        their places in the ring; layers that share the cache get what it got."""
        if owner:
            batch.plan["before", id(cache)] = [store.codes[self.earlier] for store in cache.raw or ()]
        return batch.plan["before", id(cache)]
