"""A 16-bit model's weights in the order in which the processor multiplies them.

oneDNN's bf16 product reads a weight in tiles of its own. Given rows, as torch's `linear` gives it, it rearranges the
whole matrix in every call, which for the few rows of a decode step costs as much as the product. Here each linear layer
is rearranged once, when the model is loaded: the same product of the same numbers, and no second copy of them.

A rearranged weight has a shape, a type and a size, but no rows that a model's own code could read, as some routers'
does. So only layers that a trial run calls are rearranged, and if the model then fails or computes something else, all
are put back.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from octavo.models.bind import BoundModel

OPERATORS = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")  # private: not in every torch
TRIAL = 16  # sessions of one token
SAME = 0.05  # relative: sums in another order round otherwise, and what is wrong is far off


class PrepackedLinear(nn.Linear):
    """`nn.Linear` in bf16 on a CPU, made by `prepack`. `weight.to_dense()` gives the weight's rows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def prepack(bound: BoundModel) -> None:
    """Prepack the linear layers of a model in place, one at a time, where this processor has a product for it.

    A weight that two modules share (tied embeddings) stays as it is: rearranged, it would be there twice.
    """
    layers = _layers(bound.hf) if available() else []
    if not layers:
        return
    called: set[nn.Module] = set()
    handles = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in layers]
    before = _trial(bound)
    for handle in handles:
        handle.remove()
    layers = [layer for layer in layers if layer in called]
    for layer in layers:
        _pack(layer)
    try:
        same = bool((_trial(bound) - before).norm() <= SAME * before.norm())
    except Exception:  # whatever a model does with rows that are not there
        same = False
    if not same:
        for layer in layers:
            _unpack(layer)


def available() -> bool:
    """Whether this torch and this processor have the product."""
    own = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(own, name) for name in OPERATORS)
        and own._is_mkldnn_bf16_supported()
    )


def _layers(model: nn.Module) -> list[nn.Linear]:
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and (layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "cpu")
        and users[id(layer.weight)] == 1
    ]


def _trial(bound: BoundModel) -> Tensor:
    ids = torch.randint(bound.vocab_size, (TRIAL,), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(TRIAL)

    def alone(_: int, q: Tensor, __: Tensor, v: Tensor) -> Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    return bound.forward(ids, torch.zeros_like(rows), rows, alone).float()


def _pack(layer: nn.Linear) -> None:
    # The layer itself becomes another, not its parent's entry: it may have several parents.
    layer.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()), requires_grad=False)
    layer.__class__ = PrepackedLinear


def _unpack(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.to_dense(), requires_grad=False)
    layer.__class__ = nn.Linear
