"""Modules of a model that one native pass computes: RMS norms, and the gate of an MLP.

Between its products a model's own code makes a pass over memory for every operation, in float32 on a CPU a seventh of
the time. No module is known by its class: one that looks the part is asked for random rows, and taken over if its
answer is that of the formula. In another type than float32 a module goes on as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.weights import cpu

Undo = Callable[[], None]
SAME = 1e-4  # relative, of all rows: 4-bit layers round their inputs, and so differ a little where those do


class FusedNorm(nn.Module):
    """Of the root mean square: x / √(mean(x²) + epsilon) ∘ scale."""

    scale: Tensor
    epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return super().forward(x)  # of the module's own class
        return cpu.rms_norm(x, self.scale, self.epsilon)


class FusedGate(nn.Module):
    """down(silu(gate(x)) ∘ up(x))."""

    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return super().forward(x)
        return self.down_proj(cpu.silu_gate_(self.gate_proj(x).contiguous(), self.up_proj(x).contiguous()))


def fuse(model: nn.Module) -> Iterator[Undo]:
    """Take over the modules of a model on a CPU that are found to compute one of the formulas, in place."""
    for module in model.modules():
        if (norm := _norm(module)) is not None:
            yield _become(module, FusedNorm, scale=norm[0], epsilon=norm[1])
        elif _is_gated(module):
            yield _become(module, FusedGate)


def _norm(module: nn.Module) -> tuple[Tensor, float] | None:
    """The scale and epsilon of an RMS norm; None if it is none."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = dict(module.named_parameters())
    if not isinstance(epsilon, float) or own.keys() != {"weight"} or own["weight"].dim() != 1:
        return None
    weight = own["weight"].detach().float()
    x = _rows(len(weight))
    normal = F.rms_norm(x, x.shape[1:], eps=epsilon)
    scales = (weight, 1 + weight)
    return next(((scale, epsilon) for scale in scales if _answers(module, x, lambda: normal * scale)), None)  # noqa: B023


def _is_gated(module: nn.Module) -> bool:
    size = getattr(getattr(module, "gate_proj", None), "in_features", None)
    if size is None or not {"up_proj", "down_proj"} <= dict(module.named_children()).keys():
        return False
    x = _rows(size)
    return _answers(module, x, lambda: FusedGate.forward(module, x))  # type: ignore[arg-type]


def _rows(size: int) -> Tensor:
    return torch.randn(3, size, generator=torch.Generator().manual_seed(0))


def _answers(module: nn.Module, x: Tensor, formula: Callable[[], Tensor]) -> bool:
    try:
        with torch.inference_mode():
            expected = formula()
            return bool((module(x).float() - expected).norm() <= SAME * expected.norm())
    except Exception:  # whatever a module does that is something else
        return False


def _become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> Undo:
    own, before = type(module), set(vars(module))
    for name, value in attributes.items():
        object.__setattr__(module, name, value)  # no parameter or buffer: nothing that is saved or moved
    module.__class__ = type(own.__name__, (kind, own), {"__module__": own.__module__, "__doc__": own.__doc__})

    def undo() -> None:
        module.__class__ = own
        for name in set(vars(module)) - before:
            delattr(module, name)

    return undo
