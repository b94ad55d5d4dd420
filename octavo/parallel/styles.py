"""Which layers are divided, and a loaded share as plain layers that compute together with those of the other ranks.

transformers' plan divides every second layer by its inputs and adds up what the ranks make of theirs. How such a sum
rounds depends on the number of ranks; K and V then differ, and where they are coded, a code goes the other way. So here
linear layers are divided by outputs alone: the ranks bring their inputs together before the product, and its outputs
after it. Every output is summed in one place, in the one order of an undivided layer.

transformers reads each rank's share into DTensors and wraps the forward of every module that the plan names. Here the
shares become plain tensors and the wraps hooks on the modules' own forwards. So the layers can then be taken over as
those of an undivided model are (models/prepack.py, models/fused.py): they are smaller, and otherwise the same.
"""

import re
from collections.abc import Collection
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octavo.errors import Unsupported
from octavo.models.experts import PackedExperts
from octavo.parallel.ranks import Ranks
from octavo.weights.linear import PackedLinear

Plan = dict[str, str]
"""Modules and parameters, layer numbers as *, to transformers' styles."""

# Styles by what they do at inference. A rank's columns need nothing: its next layer takes them.
LOCAL = {"colwise", "packed_colwise", "packed_rowwise", "replicate", "local_params", "mla_kv_a_proj",
         "replicated_with_grad_allreduce"}  # fmt: skip
GATHERED = {"colwise_gather_output", "colwise_rep"}
DIVIDED = {"colwise"} | GATHERED  # linear layers, by their outputs
BY_INPUTS = {"rowwise"}  # whose inputs are divided already
BY_WHOLE_INPUTS = {"rowwise_split_input", "rowwise_rep"}
SUMMED = {"moe_tp_experts", "all_reduce"}  # experts in one tensor, which are no linear layers
LOOKED_UP = {"embedding_rowwise"}  # each rank has some rows of the table
STYLES = LOCAL | GATHERED | SUMMED | LOOKED_UP  # of modules
PARTS = LOCAL | BY_INPUTS  # of experts' parameters: their module adds up what the ranks make of them


def general(name: str) -> str:
    """A module's name as plans have it: model.layers.3.mlp → model.layers.*.mlp"""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def by_outputs(model: nn.Module, plan: Plan) -> tuple[Plan, set[str]]:
    """Styles in place of those that divide a linear layer of `model` by its inputs, and the layers to which each rank
    brings but its own."""
    changed: Plan = {}
    joining: set[str] = set()
    summed = tuple(f"{name}." for name, style in plan.items() if style in SUMMED)
    for name, module in {general(name): module for name, module in model.named_modules()}.items():
        if isinstance(module, PackedExperts):
            own = f"{name}.*."
            changed |= {name: "replicate", own + "gate_proj": "colwise", own + "up_proj": "colwise"}
            changed[own + "down_proj"] = "colwise_gather_output"
            joining.add(own + "down_proj")
        elif is_linear(module) and not name.startswith(summed) and plan.get(name) in BY_INPUTS | BY_WHOLE_INPUTS:
            changed[name] = "colwise_gather_output"
            joining |= {name} if plan[name] in BY_INPUTS else set()
    return changed, joining


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | PackedLinear]:
    return isinstance(module, nn.Linear | PackedLinear)


def settle(model: nn.Module, plan: Plan, joining: Collection[str], ranks: Ranks) -> None:
    """Make plain layers of the share of a model that was loaded by `plan`; `joining` are the layers that bring their
    inputs together. Raises Unsupported for a style that is not known."""
    known = {general(name): STYLES for name, _ in model.named_modules()}
    known |= {general(name): PARTS for name, _ in model.named_parameters()}
    if strange := {style for name, style in plan.items() if name in known and style not in known[name]}:
        raise Unsupported(f"its plan divides layers as {', '.join(sorted(strange))}, which Octavo does not do")
    inputs = {module: module.in_features for module in model.modules() if is_linear(module)}
    outputs = {module: _width(module) for module in model.modules()}  # of all ranks together
    _localize(model)
    for name, module in model.named_modules():
        style = plan.get(general(name))
        if style is None:
            continue
        vars(module).pop("forward", None)  # transformers' wrap; the class's own forward is as it was
        if isinstance(module, nn.Linear):
            module.out_features = len(module.weight)
        if isinstance(module, PackedLinear) and style in DIVIDED:
            rows = ranks.own(module.out_features)
            module.out_features = rows.stop - rows.start
        if general(name) in joining:
            _join_inputs(module, inputs[module], ranks)
        if style in GATHERED:
            _join_outputs(module, outputs[module], ranks)
        if style in SUMMED:
            module.register_forward_hook(lambda _, __, out: ranks.total(out))
        if style in LOOKED_UP:
            _look_up(module, ranks.own(outputs[module]).start, ranks)


def _join_inputs(module: nn.Module, width: int, ranks: Ranks) -> None:
    module.register_forward_pre_hook(lambda _, args: (ranks.joined(args[0], width), *args[1:]))


def _join_outputs(module: nn.Module, width: int, ranks: Ranks) -> None:
    module.register_forward_hook(lambda _, __, out: ranks.joined(out, width))


def _width(module: nn.Module) -> int:
    """Outputs of a linear layer, rows of an embedding's table; 0 of other modules."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    return module.out_features if is_linear(module) else 0


def _localize(model: nn.Module) -> None:
    """Each DTensor's own part in its place; one that two modules share stays shared."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                if id(parameter) not in done:
                    done[id(parameter)] = nn.Parameter(parameter.to_local().detach().contiguous(), requires_grad=False)
                setattr(module, name, done[id(parameter)])


def _look_up(module: Any, start: int, ranks: Ranks) -> None:
    """An embedding whose table is divided by rows: each rank looks up what it has, and the sum is all of it."""
    rows = module.weight.shape[0]
    module.num_embeddings, module.padding_idx = rows, None  # the latter is of training, and perhaps another rank's

    def forward(ids: Tensor) -> Tensor:
        own = ids - start
        inside = (own >= 0) & (own < rows)
        found = type(module).forward(module, torch.where(inside, own, 0))  # the class may change later
        return ranks.total(found * inside[..., None])

    module.forward = forward
