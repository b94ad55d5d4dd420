"""A rank's share of a cache. Saved sessions see all heads: rank 0 gathers their pages, and divides them again. So do
counts of values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.cache.plan import LayerPlan
from octavo.cache.store import KVCache, Page
from octavo.devices import HOST
from octavo.parallel.heads import Share
from octavo.parallel.ranks import Ranks


class ParallelCache(KVCache):
    """One on each rank, under the same number; made by ParallelModel."""

    ranks: Ranks
    number: int
    shares: list[Share]  # of each layer
    whole: list[LayerPlan]
    together: Callable[..., Any]  # the model's
    _given: Sequence[Page | None] = ()  # what rank 0 writes, while it does

    def read_pages(self, pages: Sequence[Sequence[int]]) -> list[Page]:
        return self.together("read", self.number, [list(own) for own in pages])

    def write_pages(self, pages: Sequence[Sequence[int]], copies: Sequence[Page]) -> None:
        self._given = copies
        self.together("write", self.number, [list(own) for own in pages])
        self._given = ()

    def counts(self) -> Tensor:
        return self.together("count", self.number)

    def gather_counts(self) -> Tensor:
        """On every rank: the counts of all heads, on rank 0."""
        own = super().counts()
        parts = self.ranks.gathered(own)
        for i, plan in enumerate(self.plans if parts else ()):
            givers = self.shares[i if plan.shape.shares is None else plan.shape.shares].givers
            own[i] = sum(parts[rank][i] for rank in givers)
        return own

    def gather(self, pages: list[list[int]]) -> list[Page]:
        """On every rank: all heads' pages, on rank 0."""
        own = zip(self.paged_stores, super().read_pages(pages), strict=True)
        return [(self._whole(i, codes), None if scales is None else self._whole(i, scales))
                for (_, i, _), (codes, scales) in own]  # fmt: skip

    def divide(self, pages: list[list[int]]) -> None:
        """On every rank: put its heads of the pages that rank 0 writes into its own."""
        copies: list[Page] = []
        for (_, i, store), own, page in zip(self.paged_stores, pages, self._given or [None] * len(pages), strict=True):
            codes, scales = page if page is not None else (None, None)
            part = self._part(i, store.codes, len(own), codes)
            copies.append((part, None if store.scales is None else self._part(i, store.scales, len(own), scales)))
        super().write_pages(pages, copies)

    def _whole(self, layer: int, x: Tensor) -> Tensor:
        """Of [pages, heads, …] all heads, on the host of rank 0."""
        own, share = x.to(HOST).contiguous(), self.shares[layer]
        if not len(own):
            return own.new_empty(0, share.total, *own.shape[2:])
        parts = self.ranks.gathered(own)
        return torch.cat([parts[rank] for rank in share.givers], 1) if parts else own

    def _part(self, layer: int, store: Tensor, pages: int, x: Tensor | None) -> Tensor:
        """This rank's heads of [pages, heads, …], which rank 0 alone has."""
        own, share = torch.empty(pages, *store.shape[1:], dtype=store.dtype), self.shares[layer]
        each = range(self.ranks.count)
        parts = None if x is None else [x[:, share.own(rank)].to(HOST).contiguous() for rank in each]
        return self.ranks.scattered(own, parts) if pages else own
