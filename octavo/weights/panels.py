"""Linear layers whose weights lie in panels, in the order in which the native CPU product reads them.

Weights keep their type, of 16 or 32 bits, and sums are float32; on a processor that multiplies pairs of bf16 numbers
rows are rounded to bf16 before their products (native/panels.cpp). There is one copy of the weights: the panels are the
layer's own parameter. An output's bits depend on its row alone, never on how many rows are
multiplied together.
"""

import torch
from torch import Tensor, nn

from octavo.weights import cpu


class PanelLinear(nn.Linear):
    """`nn.Linear` of which `weight` is in panels of 16 outputs (cpu.pack_panels)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] of x's type."""
        y = cpu.multiply_together([self.operand(x)], x.reshape(-1, self.in_features))[0]
        return y.view(*x.shape[:-1], self.out_features)

    def operand(self, x: Tensor) -> cpu.Weight:
        """The layer as products with rows of x's type take it."""
        own = self._parameters  # attributes that are parameters are slow: nn.Module looks for them last
        weight, bias = own["weight"], own["bias"]
        assert weight is not None
        return weight, self.out_features, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)


class TypedEmbedding(nn.Embedding):
    """`nn.Embedding` whose rows leave it in another type than its weight has."""

    leaves_as: torch.dtype | None = None  # None: the weight's

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.leaves_as or self.weight.dtype)


class PanelEmbedding(TypedEmbedding):
    """The same, of a weight in panels: that of a tied head."""

    def forward(self, ids: Tensor) -> Tensor:
        panels = _steps(self.weight)
        panel = panels.shape[-1]
        rows = panels[ids // panel, :, ids % panel].view(self.weight.dtype)
        return rows.to(self.leaves_as or self.weight.dtype)


def unpacked(panels: Tensor, out: int) -> Tensor:
    """The rows of a weight in panels: [out, in]."""
    rows = _steps(panels).transpose(1, 2).flatten(0, 1)[:out]
    return rows.clone(memory_format=torch.contiguous_format).view(panels.dtype)


def _steps(panels: Tensor) -> Tensor:
    """With one number for each output and step: pairs of bf16 as int32."""
    return panels.view(torch.int32) if cpu.in_pairs(panels) else panels
