"""A loaded share as plain layers: what transformers' tensor-parallel styles do when a model only infers.

transformers reads each rank's share into DTensors and wraps the forward of every module that the plan names. Here the
shares become plain tensors and the wraps hooks on the modules' own forwards. So the layers can then be taken over as
those of an undivided model are (models/prepack.py, models/fused.py): they are smaller, and otherwise the same.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octavo.errors import Unsupported

# Styles by what they do at inference. A rank's columns need nothing: its next layer takes them.
LOCAL = {"colwise", "packed_colwise", "packed_rowwise", "replicate", "local_params", "mla_kv_a_proj",
         "replicated_with_grad_allreduce"}  # fmt: skip
SUMMED = {"rowwise", "moe_tp_experts", "all_reduce"}
GATHERED = {"colwise_gather_output", "colwise_rep"}
SPLIT = {"rowwise_split_input", "rowwise_rep"}  # takes its columns of an input that every rank has whole
LOOKED_UP = {"embedding_rowwise"}  # each rank has some rows of the table
STYLES = LOCAL | SUMMED | GATHERED | SPLIT | LOOKED_UP


def settle(model: nn.Module, plan: dict[str, str], rank: int, ranks: int) -> None:
    """Make plain layers of the share of a model that was loaded by `plan`, modules and parameters (layer numbers as *)
    to styles. Raises Unsupported for a style that is not known."""
    if strange := {style for style in plan.values() if style not in STYLES}:
        raise Unsupported(f"its plan divides layers as {', '.join(sorted(strange))}, which Octavo does not do")
    sizes = {module: _width(module) for module in model.modules()}  # of all ranks together
    _localize(model)
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None:
            continue
        vars(module).pop("forward", None)  # transformers' wrap; the class's own forward is as it was
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        if style in SUMMED | SPLIT:
            if rank and getattr(module, "bias", None) is not None:
                module.bias = None  # it is added once
            module.register_forward_hook(lambda _, __, out: total(out))
        if style in SPLIT:
            module.register_forward_pre_hook(lambda _, args: (args[0].chunk(ranks, -1)[rank], *args[1:]))
        if style in GATHERED:
            module.register_forward_hook(partial(_joined, width=sizes[module], ranks=ranks))
        if style in LOOKED_UP:
            _look_up(module, rank * -(-sizes[module] // ranks))


def total(x: Tensor) -> Tensor:
    """The sum over all ranks."""
    x = x.contiguous()
    dist.all_reduce(x)
    return x


def _joined(_: nn.Module, __: Any, x: Tensor, width: int, ranks: int) -> Tensor:
    """The ranks' columns side by side, `width` of them. As torch cuts a dimension, the last ranks may have fewer."""
    x = nn.functional.pad(x, (0, -(-width // ranks) - x.shape[-1])).contiguous()
    parts = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(parts, x)
    return torch.cat(parts, -1)[..., :width]


def _width(module: nn.Module) -> int:
    """Outputs of a linear layer, rows of an embedding's table; 0 of other modules."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    return module.out_features if isinstance(module, nn.Linear) else 0


def _localize(model: nn.Module) -> None:
    """Each DTensor's own part in its place; one that two modules share stays shared."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                if id(parameter) not in done:
                    done[id(parameter)] = nn.Parameter(parameter.to_local().detach().contiguous(), requires_grad=False)
                setattr(module, name, done[id(parameter)])


def _look_up(module: Any, start: int) -> None:
    """An embedding whose table is divided by rows: each rank looks up what it has, and the sum is all of it."""
    rows = module.weight.shape[0]
    module.num_embeddings = rows

    def forward(ids: Tensor) -> Tensor:
        own = ids - start
        inside = (own >= 0) & (own < rows)
        found = type(module).forward(module, torch.where(inside, own, 0))  # the class may change later
        return total(found * inside[..., None])

    module.forward = forward
