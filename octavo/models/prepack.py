"""A 16-bit model's weights in the order in which the processor multiplies them.

oneDNN's bf16 product reads a weight in tiles of its own. Given rows, as torch's `linear` gives it, it rearranges the
whole matrix in every call, which for the few rows of a decode step costs as much as the product. Here each linear layer
is rearranged once, when the model is loaded: the same product of the same numbers, and no second copy of them.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn


class PrepackedLinear(nn.Module):
    """`nn.Linear` in bf16 on a CPU. `weight` is opaque: it has a shape and a size, and `to_dense` gives its rows."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def prepack(model: nn.Module) -> None:
    """Prepack the linear layers of a model in place, where this processor has a product for it.

    A weight that two modules share (tied embeddings) stays as it is: rearranged, it would be there twice.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is not nn.Linear or users[id(child.weight)] > 1:
                continue
            if child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
                setattr(parent, name, PrepackedLinear(child))
