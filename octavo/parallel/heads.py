"""Which KV heads of a layer a rank holds, found by what the ranks compute and not by the config.

With at least as many KV heads as ranks they are divided; with fewer, several ranks hold the same one. A plan that
computes attention on every rank (fused projections whose output is gathered) leaves all heads to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.cache.plan import LayerPlan, LayerShape
from octavo.quant.codec import Static


@dataclass(frozen=True)
class Share:
    """Of the `total` KV heads of a layer each rank has `count`, from `starts[rank]` on."""

    starts: tuple[int, ...]
    count: int
    total: int

    @classmethod
    def of(cls, rows: Tensor) -> Share:
        """`rows` [ranks, tokens, heads, dim] are K of the same tokens on each rank."""
        starts: list[int] = []
        count = total = rows.shape[2]
        for i, own in enumerate(rows[1:], 1):
            starts.append(total - count)
            if not torch.allclose(own, rows[i - 1], rtol=1e-3, atol=1e-5):
                total += count
        return cls((*starts, total - count), count, total)

    def own(self, rank: int) -> slice:
        return slice(self.starts[rank], self.starts[rank] + self.count)

    @property
    def givers(self) -> list[int]:
        """The ranks whose heads together are all heads, each once and in order."""
        return [rank for rank, start in enumerate(self.starts) if start not in self.starts[:rank]]

    def whole(self, shape: LayerShape) -> LayerShape:
        """The layer's shape with all heads."""
        return replace(shape, kv_heads=self.total)

    def sliced(self, plan: LayerPlan, shape: LayerShape, rank: int) -> LayerPlan:
        """A rank's part of the whole layer's plan; `shape` is the rank's own."""
        heads = self.own(rank)
        k, v = (None if x is None else Static(x.mu[heads], x.c[heads]) for x in (plan.k, plan.v))
        return LayerPlan(shape, plan.format, k, v)
