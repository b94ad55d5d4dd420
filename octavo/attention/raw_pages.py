"""Raw pages of a step, where a format has edges: which of them hold the rows that its queries read.

A query reads raw the rows of page 0 and those of its own span. Page 0, and the own span of a sequence with one new
token, are in the cache once the step's rows are written. The own spans of a chunk's queries begin before the step or in
it: the chunk's rows, and earlier ones of its first span, are laid out in pages that live as long as the step.
"""

from __future__ import annotations

import torch

from octavo.cache.batch import Batch


class RawPages:
    """Which pages, the same for all layers."""

    def __init__(self, batch: Batch, span: int, size: int):
        assert batch.ring is not None
        self.hand = torch.full((len(batch.q_lens),), -1)  # [B] first page in hand, −1 where the ring has all
        self.slots = torch.full((len(batch.ids),), -1)  # [T] of new rows in hand
        self.count = 0  # pages in hand
        ring_pages, ring = span // size, batch.ring.tolist()
        earlier: list[tuple[int, int]] = []  # pages of the ring, and where they go
        row = 0
        for i, (n, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
            begin = kv_len - n
            if n > 1:
                first = begin // span * ring_pages
                self.hand[i] = self.count
                at = torch.arange(begin - first * size, kv_len - first * size)
                self.slots[row : row + n] = self.count * size + at
                # Of page 0 the cache itself has all rows.
                earlier += [(ring[i] + page % ring_pages, self.count + page - first)
                            for page in range(max(first, 1), -(-begin // size))]  # fmt: skip
                self.count += -(-kv_len // size) - first
            row += n
        self.earlier, self.to = torch.tensor(earlier, dtype=torch.int64).view(-1, 2).unbind(1)
