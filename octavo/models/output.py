"""How strongly a model's output projections read attention's output: what an error in a channel of V is worth.

The layer is found by what it does, whatever its name, class or number of bits: after attention it is the first one with
a matrix that takes rows as wide as attention's output. It is measured by what it makes of unit vectors.
"""

import torch
from torch import Tensor, nn

from octavo.models.bind import BoundModel
from octavo.models.changes import watched
from octavo.models.hook import attention_modules, itself

UNITS = 512  # unit vectors at a time


def output_norms(bound: BoundModel) -> list[Tensor]:
    """Of each layer the norm of the weights behind each channel of attention's output, float32 [heads, v_dim] on the
    CPU. It is 1 everywhere in a layer whose output projection is not found."""
    projections = _output_projections(bound)
    return [
        _norms(projections[i], spec.heads, spec.shape.v_dim, bound.dtype, spec.shape.device)
        if i in projections
        else torch.ones(spec.heads, spec.shape.v_dim)
        for i, spec in enumerate(bound.layers)
    ]


def _output_projections(bound: BoundModel) -> dict[int, nn.Module]:
    """By layer, as a run over one token reaches them."""
    found: dict[int, nn.Module] = {}
    returned: set[int] = set()  # layers whose attention has been computed

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        returned.add(layer)
        return itself(layer, q, k, v)

    def watch(layer: int, width: int, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def called(module: nn.Module, inputs: tuple[object, ...]) -> None:
            rows = inputs[0] if inputs else None
            if layer in returned and layer not in found and isinstance(rows, Tensor) and rows.shape[-1] == width:
                found[layer] = module

        return module.register_forward_pre_hook(called)

    handles = (
        watch(layer, bound.layers[layer].heads * bound.layers[layer].shape.v_dim, module)
        for layer, attention in attention_modules(bound.hf).items()
        for module in attention.modules()
        if module is not attention and any(x.dim() > 1 for x in (*module.parameters(False), *module.buffers(False)))
    )
    first = torch.zeros(1, dtype=torch.int64, device=bound.device)
    with watched(handles):
        bound.forward(first, first, first, attend)
    return found


@torch.inference_mode()
def _norms(projection: nn.Module, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    units = torch.eye(heads * dim, dtype=dtype, device=device)
    bias = projection(torch.zeros_like(units[:1]))
    norms = [(projection(some) - bias).float().norm(dim=-1).cpu() for some in units.split(UNITS)]
    return torch.cat(norms).view(heads, dim)
