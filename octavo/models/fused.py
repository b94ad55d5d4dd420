"""Modules of a model that one native pass computes: RMS norms, also with a gate, an MLP's gate with its two products,
RoPE in attention.

Between its products a model's own code makes a pass over memory for every operation, in float32 on a CPU a seventh of
the time. No module is known by its class: one that looks the part is asked for random rows, and taken over if its
answer is that of the formula. In another type than float32 a module goes on as before.

RoPE is no module but a function of the model's file, which attention finds by its name. A module that takes part gets
its own forward with another function under that name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.changes import Undo, become, close, with_functions
from octavo.weights import cpu
from octavo.weights.panels import PanelLinear

logger = logging.getLogger("octavo")
ROTATION = "apply_rotary_pos_emb"  # in every file of transformers
GATES = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")  # names of an MLP's layers
SAME = 1e-4  # relative, of all rows: 4-bit layers round their inputs, and so differ a little where those do
SIZES = (0.01, 1.0, 300.0)  # of the rows that are asked for: an epsilon shows in small ones, a limit in large ones


class FusedNorm(nn.Module):
    """Of the root mean square: x / √(mean(x²) + epsilon) ∘ scale."""

    scale: Tensor
    epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return super().forward(x)  # of the module's own class
        return cpu.rms_norm(x, self.scale, self.epsilon)


class FusedGatedNorm(nn.Module):
    """Of the root mean square of each group of numbers, before or after a gate: norm(x ∘ silu(gate)) ∘ scale or
    norm(x) ∘ scale ∘ silu(gate)."""

    scale: Tensor
    epsilon: float
    group: int
    gate_first: bool

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None or x.dtype != torch.float32 or gate.dtype != torch.float32:
            return super().forward(x, gate)
        return cpu.gated_norm(x, gate, self.scale, self.epsilon, self.group, self.gate_first)


class FusedGate(nn.Module):
    """down(silu(gate(x)) ∘ up(x))."""

    gate_proj: Any
    up_proj: Any
    down_proj: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return super().forward(x)
        gate, up = self.gate_proj, self.up_proj
        if _multiplied_together(gate, up):
            y = cpu.multiply_gated(gate.operand(x), up.operand(x), x.reshape(-1, x.shape[-1]))
            return self.down_proj(y.view(*x.shape[:-1], -1))
        return self.down_proj(cpu.silu_gate_(gate(x).contiguous(), up(x).contiguous()))


def _multiplied_together(gate: Any, up: Any) -> bool:
    """Whether both lie in panels of one type and size, and nobody watches them."""
    return (
        isinstance(gate, PanelLinear)
        and isinstance(up, PanelLinear)
        and (gate.weight.shape, gate.weight.dtype) == (up.weight.shape, up.weight.dtype)
        and not any((*gate._forward_hooks, *gate._forward_pre_hooks, *up._forward_hooks, *up._forward_pre_hooks))
    )


def fuse(model: nn.Module) -> Iterator[Undo]:
    """Take over the modules of a model on a CPU that are found to compute one of the formulas, in place."""
    for module in model.modules():
        if (gated := _gated_norm(module)) is not None:
            yield become(module, FusedGatedNorm, **gated)
        elif (norm := _norm(module)) is not None:
            yield become(module, FusedNorm, scale=norm[0], epsilon=norm[1])
        elif (layers := _gate(module)) is not None:
            yield become(module, FusedGate, **layers)
        elif (rotating := _rotating(type(module))) is not None:  # type: ignore[arg-type]
            yield become(module, rotating)


def _norm(module: nn.Module) -> tuple[Tensor, float] | None:
    """The scale and epsilon of an RMS norm; None if it is none."""
    if (found := _weight_and_epsilon(module)) is None:
        return None
    weight, epsilon = found
    rows, size = (_rows(len(weight)),), weight.shape
    for scale in (weight, 1 + weight):
        if _answers(module, rows, lambda x: F.rms_norm(x, size, eps=epsilon) * scale):  # noqa: B023
            return scale, epsilon
    return None


def _gated_norm(module: nn.Module) -> dict[str, Any] | None:
    """What a FusedGatedNorm has of a module; None if it is none."""
    if (found := _weight_and_epsilon(module)) is None:
        return None
    scale, epsilon = found
    dim = len(scale)
    x, gate = _rows(2 * dim).split(dim, -1)
    group = getattr(module, "group_size", dim // getattr(module, "n_groups", 1))
    for gate_first in (True, False):
        if _answers(module, (x, gate), lambda x, z: cpu.gated_norm(x, z, scale, epsilon, group, gate_first)):  # noqa: B023
            return {"scale": scale, "epsilon": epsilon, "group": group, "gate_first": gate_first}
    return None


def _weight_and_epsilon(module: nn.Module) -> tuple[Tensor, float] | None:
    """Of a module that may be a norm: a weight for each channel, and nothing else."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = dict(module.named_parameters())
    if not isinstance(epsilon, float) or own.keys() != {"weight"} or own["weight"].dim() != 1:
        return None
    return own["weight"].detach().float(), epsilon


def _gate(module: nn.Module) -> dict[str, nn.Module] | None:
    """The layers of an MLP with a gate by FusedGate's names, where it has others; None if it is none."""
    children = dict(module.named_children())
    layers = next(({own: children[name] for own, name in zip(GATES[0], names, strict=True)}
                   for names in GATES if children.keys() >= set(names)), None)  # fmt: skip
    size = getattr(layers["gate_proj"], "in_features", None) if layers else None
    if layers is None or size is None:
        return None
    made = SimpleNamespace(**layers)
    if not _answers(module, (_rows(size),), lambda x: FusedGate.forward(made, x)):  # type: ignore[arg-type]
        return None
    return {name: layer for name, layer in layers.items() if name not in children}


@lru_cache
def _rotating(attention: type[nn.Module]) -> type[nn.Module] | None:
    """A class with the forward of an attention whose rotation of Q and K is that of `rotated`; None if it has none."""
    forward = attention.forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    own = forward.__globals__.get(ROTATION)
    if own is None or ROTATION not in forward.__code__.co_names:
        return None
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(1, *shape, generator=generator) for shape in ((4, 3, 16), (2, 3, 16), (3, 16), (3, 16))
    )
    try:
        with torch.inference_mode():
            if not all(map(torch.equal, own(q, k, cos, sin), _rotated(q, k, cos, sin))):
                return None
    except Exception:  # whatever a function of that name does that is something else
        logger.debug("%s keeps its own rotation", attention.__name__, exc_info=True)
        return None

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        plain = not args and not kwargs and q.dtype == k.dtype == cos.dtype == torch.float32
        rows = (1, *q.shape[2:])
        if plain and len(q) == len(k) == 1 and cos.shape == sin.shape == rows == (1, *k.shape[2:]):
            return _rotated(q, k, cos, sin)
        return own(q, k, cos, sin, *args, **kwargs)

    same = with_functions(forward, {ROTATION: rotated})
    return type("FusedRotation", (nn.Module,), {"forward": same, "__module__": __name__})


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [1, heads, T, dim] by cos and sin [1, T, dim]: the same numbers as torch's own operations."""
    q, k = (cpu.rope(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for x in (q, k))
    return q, k


def _rows(size: int) -> Tensor:
    """Three of each size, [3 · sizes, size]."""
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    return torch.cat([factor * rows for factor in SIZES])


def _answers(module: nn.Module, rows: Sequence[Tensor], formula: Callable[..., Tensor]) -> bool:
    """Whether the module computes the formula, for rows of each size."""
    try:
        with torch.inference_mode():
            expected = formula(*rows)
            sizes = zip(module(*rows).float().chunk(len(SIZES)), expected.chunk(len(SIZES)), strict=True)
            return all(close(own, asked, SAME) for own, asked in sizes)
    except Exception:  # whatever a module does that is something else
        logger.debug("%s is not fused", type(module).__name__, exc_info=True)
        return False
