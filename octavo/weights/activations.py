"""Activation functions whose bits depend on the number alone (native/elementwise.cpp)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from octavo.weights import cpu


class ExactActivation(nn.Module):
    """An activation module whose forward is the native function of that name."""

    function: str

    def forward(self, x: Tensor) -> Tensor:
        return cpu.activate(self.function, x)


class Silu(ExactActivation):
    function = "silu"


class Gelu(ExactActivation):
    function = "gelu"


class GeluTanh(ExactActivation):
    function = "gelu_tanh"


def exact(module: nn.Module) -> type[ExactActivation] | None:
    """What computes the same as an activation module; None for modules that are none, or of other functions."""
    if isinstance(module, nn.GELU):
        return GeluTanh if module.approximate == "tanh" else Gelu
    return {nn.SiLU: Silu, SiLUActivation: Silu, GELUActivation: Gelu, GELUTanh: GeluTanh}.get(type(module))
