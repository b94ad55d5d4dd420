"""Activation functions whose bits depend on the number alone (native/elementwise.cpp)."""

from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from octavo.weights import cpu

NATIVE = {nn.SiLU: "silu", SiLUActivation: "silu", GELUActivation: "gelu", GELUTanh: "gelu_tanh"}


class ExactActivation(nn.Module):
    """An activation module whose forward is the native function of that name."""

    function: str

    def forward(self, x: Tensor) -> Tensor:
        return cpu.activate(self.function, x)


def native_function(module: nn.Module) -> str | None:
    """The native function that computes the same as an activation module; None for modules that are none, or of other
    functions."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return NATIVE.get(type(module))
