"""What is kept from calibration: statistics per KV head and channel, not one choice of scale.

`Statistics` accumulates the rows of one side (K or V) of one layer in a stream; its memory is a few numbers a channel,
whatever the number of samples. The static part of a codec is chosen from it later: by `range_static` for codes without
a scale of their own, by `attention_static` for those with one scale a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.quant.codec import FP8_LARGEST, Static
from octavo.quant.format import Granularity

QUANTILES = {"q01": 0.01, "q50": 0.50, "q99": 0.99}
QUANTILE_ROWS = 256  # rows of a window that a quantile is taken over; sorting more costs more than the model's forward


class Sum:
    """A sum of tensors in two float64 numbers, the second of what rounding takes from the first (Knuth's TwoSum).

    It is good to about 106 bits. Shards of a calibration that were added up elsewhere, and then together, come to the
    float64 numbers of one run; plain sums would differ in their last bits.
    """

    def __init__(self, *shape: int):
        self.high, self.low = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        x = x.double()
        total = self.high + x
        part = total - self.high
        self.low += (self.high - (total - part)) + (x - part)
        self.high = total

    def merge(self, other: Sum) -> None:
        self.add(other.high)
        self.low += other.low

    @property
    def value(self) -> Tensor:
        return self.high + self.low


@dataclass
class Statistics:
    """Running statistics of rows [tokens, kv_heads, dim]; every one float32 [kv_heads, dim]."""

    kv_heads: int
    dim: int
    rows: int = 0  # that mean and std are of
    windows: int = 0
    min: Tensor = field(init=False)
    max: Tensor = field(init=False)
    total: Sum = field(init=False)  # over hundreds of thousands of rows
    squares: Sum = field(init=False)
    quantiles: Sum = field(init=False)  # [3, kv_heads, dim], summed over windows

    def __post_init__(self) -> None:
        shape = (self.kv_heads, self.dim)
        self.min, self.max = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
        self.total, self.squares, self.quantiles = Sum(*shape), Sum(*shape), Sum(len(QUANTILES), *shape)

    def update(self, x: Tensor, skip: int = 0) -> None:
        """Add rows of a window; mean and std leave out the first `skip`. All are finite: the caller's check."""
        x = x.detach().float().cpu()
        self.min = torch.minimum(self.min, x.amin(0))
        self.max = torch.maximum(self.max, x.amax(0))
        thinned = x[:: -(-len(x) // QUANTILE_ROWS)]
        self.quantiles.add(torch.quantile(thinned, torch.tensor(list(QUANTILES.values())), dim=0))
        self.windows += 1
        x = x[skip:].double()
        self.total.add(x.sum(0))
        self.squares.add(x.square().sum(0))
        self.rows += len(x)

    def merge(self, other: Statistics) -> None:
        """Add the rows that another one has seen: the same as to have seen them here."""
        self.min, self.max = torch.minimum(self.min, other.min), torch.maximum(self.max, other.max)
        for own, its in ((self.total, other.total), (self.squares, other.squares), (self.quantiles, other.quantiles)):
            own.merge(its)
        self.rows += other.rows
        self.windows += other.windows

    def summary(self) -> dict[str, Tensor]:
        """Name → float32 [kv_heads, dim]. Quantiles are means of the windows' own quantiles."""
        mean = self.total.value / self.rows
        std = (self.squares.value / self.rows - mean.square()).clamp(min=0).sqrt()
        quantiles = dict(zip(QUANTILES, (self.quantiles.value / self.windows).float(), strict=True))
        absmax = torch.maximum(self.min.abs(), self.max.abs())
        return {
            "min": self.min,
            "max": self.max,
            "absmax": absmax,
            "mean": mean.float(),
            "std": std.float(),
            **quantiles,
        }


class LayerStatistics:
    """Statistics of the K and V that a layer keeps and of what reads them: its own attention, and that of the layers
    that share them."""

    def __init__(self, kv_heads: int, k_dim: int, v_dim: int):
        self.k, self.v = Statistics(kv_heads, k_dim), Statistics(kv_heads, v_dim)
        self.queries = Sum(kv_heads, k_dim)  # of their squares
        self.query_rows = 0
        self.output = torch.zeros(kv_heads, v_dim)  # squares of the norms of the output projections' weights

    def update(self, k: Tensor, v: Tensor, skip: int = 0) -> None:
        """Add rows of a window, as to `Statistics`."""
        self.k.update(k, skip)
        self.v.update(v, skip)

    def read_by(self, q: Tensor) -> None:
        """Add queries [tokens, heads, k_dim]; consecutive heads read the same KV head."""
        q = q.detach().cpu().double().unflatten(1, (self.k.kv_heads, -1))
        self.queries.add(q.square().sum((0, 2)))
        self.query_rows += q.shape[0] * q.shape[2]

    def merge(self, other: LayerStatistics) -> None:
        """Add what another one of the same layer has seen; the output projection is the layer's own."""
        self.k.merge(other.k)
        self.v.merge(other.v)
        self.queries.merge(other.queries)
        self.query_rows += other.query_rows

    def projected_by(self, norms: Tensor) -> None:
        """Add an output projection: the norm of its weights behind each channel of its heads, [heads, v_dim]."""
        self.output += norms.unflatten(0, (len(self.output), -1)).square().sum(1)

    def summary(self) -> dict[str, dict[str, Tensor]]:
        """Of each side, with `reader`: how strongly attention reads a channel. Of K that is the root mean square of the
        queries, of V the norm of the output projections' weights."""
        queries = (self.queries.value / self.query_rows).sqrt().float()
        return {"k": {**self.k.summary(), "reader": queries}, "v": {**self.v.summary(), "reader": self.output.sqrt()}}


def largest_of(x: Tensor, granularity: Granularity) -> Tensor:
    """Of x [kv_heads, dim] the largest of the layer [1, 1], of each head [kv_heads, 1], or x."""
    over = {"tensor": (0, 1), "head": (1,), "channel": ()}[granularity]
    return x.amax(over, keepdim=True) if over else x


def range_static(low: Tensor, high: Tensor, granularity: Granularity, headroom: float) -> Static:
    """The static part from calibrated ranges `low`, `high` [kv_heads, dim].

        mu = (min + max)/2        c = headroom·(max − min)/255

    with min and max over the whole layer (`tensor`), each KV head (`head`) or each channel (`channel`); `tensor` with
    headroom 1 is the recipe of LMDeploy's page "KV Cache Quantization and Test Results". A range of zero (a constant
    channel) has no scale: its c is 1, its codes 0, and it decodes to its constant.
    """
    low, high = -largest_of(-low, granularity).expand(low.shape), largest_of(high, granularity).expand(high.shape)
    c = headroom * (high - low) / 255
    # Below 1e-30 the reciprocal could leave float32.
    return Static(mu=((low + high) / 2).contiguous(), c=torch.where(c > 1e-30, c, 1.0).contiguous())


def float_static(low: Tensor, high: Tensor, granularity: Granularity, headroom: float) -> Static:
    """The static part of fp8 from calibrated ranges `low`, `high` [kv_heads, dim], as other engines have it.

        mu = 0        c = headroom·max(|min|, |max|)/448

    over the layer, each KV head or each channel.
    """
    largest = largest_of(torch.maximum(low.abs(), high.abs()), granularity).expand(low.shape)
    c = headroom * largest / FP8_LARGEST
    return Static(mu=torch.zeros_like(low), c=torch.where(c > 1e-30, c, 1.0).contiguous())


def attention_static(mean: Tensor, std: Tensor, reader: Tensor) -> Static:
    """The static part that costs attention least, for codes with one scale a token; all float32 [kv_heads, dim].

        mu = mean        c = sqrt(std / reader)

    The rotation spreads a row's rounding error evenly over y = (x − mu)/c, so a channel's error is proportional to its
    c and what attention makes of it to c·reader, while the row's scale follows the squares of std/c: this c minimizes
    the product of both sums. Each head's c is then multiplied by one number so that its y has unit variance, where the
    table of token scales is at home. Channels far below their head's others count as a thousandth of these: a constant
    or unread channel gets neither a c of 0 nor an endless one.
    """

    def raised(x: Tensor) -> Tensor:
        typical = x.square().mean(1, keepdim=True).sqrt()
        return torch.where(typical > 1e-30, torch.maximum(x, typical / 1000), 1.0)

    spread = raised(std)
    c = (spread / raised(reader)).sqrt()
    return Static(mu=mean.contiguous(), c=c * (spread / c).square().mean(1, keepdim=True).sqrt())
