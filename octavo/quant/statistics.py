"""What is kept from calibration: statistics per KV head and channel, not one choice of scale.

`Statistics` accumulates the rows of one side (K or V) of one layer in a stream; its memory is a few numbers a channel,
whatever the number of samples. Granularity and headroom are chosen from it later, by `static_part`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.quant.codec import Static
from octavo.quant.format import Granularity

QUANTILES = {"q01": 0.01, "q50": 0.50, "q99": 0.99}
QUANTILE_ROWS = 256  # rows of a window that a quantile is taken over; sorting more costs more than the model's forward


@dataclass
class Statistics:
    """Running statistics of rows [tokens, kv_heads, dim]; every one float32 [kv_heads, dim]."""

    kv_heads: int
    dim: int
    rows: int = 0
    windows: int = 0
    min: Tensor = field(init=False)
    max: Tensor = field(init=False)
    total: Tensor = field(init=False)  # float64: sums over hundreds of thousands of rows
    squares: Tensor = field(init=False)
    quantiles: Tensor = field(init=False)  # [3, kv_heads, dim], summed over windows

    def __post_init__(self) -> None:
        shape = (self.kv_heads, self.dim)
        self.min, self.max = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
        self.total, self.squares = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        self.quantiles = torch.zeros(len(QUANTILES), *shape)

    def update(self, x: Tensor) -> None:
        """Add one window of rows. The caller has checked that they are finite."""
        x = x.detach().float().cpu()
        self.min = torch.minimum(self.min, x.amin(0))
        self.max = torch.maximum(self.max, x.amax(0))
        self.total += x.sum(0, dtype=torch.float64)
        self.squares += x.double().square().sum(0)
        thinned = x[:: -(-len(x) // QUANTILE_ROWS)]
        self.quantiles += torch.quantile(thinned, torch.tensor(list(QUANTILES.values())), dim=0)
        self.rows += len(x)
        self.windows += 1

    def summary(self) -> dict[str, Tensor]:
        """Name → float32 [kv_heads, dim]. Quantiles are means of the windows' own quantiles."""
        mean = self.total / self.rows
        std = (self.squares / self.rows - mean.square()).clamp(min=0).sqrt()
        quantiles = dict(zip(QUANTILES, self.quantiles / self.windows, strict=True))
        absmax = torch.maximum(self.min.abs(), self.max.abs())
        return {
            "min": self.min,
            "max": self.max,
            "absmax": absmax,
            "mean": mean.float(),
            "std": std.float(),
            **quantiles,
        }


def static_part(low: Tensor, high: Tensor, granularity: Granularity, headroom: float) -> Static:
    """The static part from calibrated ranges `low`, `high` [kv_heads, dim].

        mu = (min + max)/2        c = headroom·(max − min)/255

    with min and max over the whole layer (`tensor`), each KV head (`head`) or each channel (`channel`); `tensor` with
    headroom 1 is the recipe of LMDeploy's page "KV Cache Quantization and Test Results". A range of zero (a constant
    channel) has no scale: its c is 1, its codes 0, and it decodes to its constant.
    """
    over = {"tensor": (0, 1), "head": (1,), "channel": ()}[granularity]
    if over:
        shape = low.shape
        low, high = low.amin(over, keepdim=True).expand(shape), high.amax(over, keepdim=True).expand(shape)
    c = headroom * (high - low) / 255
    # Below 1e-30 the reciprocal could leave float32.
    return Static(mu=((low + high) / 2).contiguous(), c=torch.where(c > 1e-30, c, 1.0).contiguous())
