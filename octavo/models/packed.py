"""Models whose linear layers hold 4-bit weights: the architecture with PackedLinear in their place, then filled.

transformers builds the model and loads what is not quantized, as ever. It never sees a packed tensor, and a 16-bit
weight is never made.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from octavo.errors import OctavoError, Unsupported
from octavo.models.experts import PackedExperts, is_experts
from octavo.weights import GROUP_SIZES
from octavo.weights.checkpoint import PackedLayers, WeightFormat
from octavo.weights.layouts import AWQ, Int4Weight
from octavo.weights.linear import PackedLinear
from octavo.weights.panels import PanelLinear


def with_packed_layers(architecture: type[PreTrainedModel], packs: Callable[[str], bool]) -> type[PreTrainedModel]:
    """`architecture` with an empty PackedLinear in place of each linear layer, experts' too, whose name `packs`, unless
    its weight is tied."""

    def build(model: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        architecture.__init__(model, config, *args, **kwargs)
        tied = tied_layers(architecture, config)
        for name, layer in list(model.named_modules()):
            if is_experts(layer, config.model_type) and packs(f"{name}.0.down_proj"):
                model.set_submodule(name, PackedExperts(layer))
            if type(layer) is nn.Linear and name not in tied and packs(name):
                own = PackedLinear(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype)
                model.set_submodule(name, own.to(layer.weight.device))

    return type(architecture.__name__, (architecture,), {"__init__": build, "__module__": architecture.__module__})


def tied_layers(architecture: type[PreTrainedModel], config: PreTrainedConfig) -> set[str]:
    """Layers that a config says have the weight of another: the head of most small models."""
    keys = getattr(architecture, "_tied_weights_keys", None)
    if not config.tie_word_embeddings or not isinstance(keys, dict):
        return set()
    return {name.removesuffix(".weight") for name in keys}


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def parameters(model: nn.Module) -> int:
    """How many there are, tied ones once, in whatever type."""
    packed = sum(layer.in_features * layer.out_features for layer in packed_layers(model).values())
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, PanelLinear):  # without what pads the last panel
            sizes[id(layer.weight)] = layer.in_features * layer.out_features
    return packed + sum(sizes.values())


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters, tied ones once, and of packed weights."""
    return sum(p.nbytes for p in model.parameters()) + sum(layer.nbytes for layer in packed_layers(model).values())


def packable(model: PreTrainedModel, group_size: int) -> dict[str, nn.Linear]:
    """The linear layers that groups divide and AWQ can store, by name; neither the head nor weights used twice."""
    head = model.get_output_embeddings()
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and users[id(layer.weight)] == 1
        and layer.in_features % group_size == 0 and layer.out_features % AWQ.multiple[0] == 0
    }  # fmt: skip


def fitting_groups(model: PreTrainedModel) -> list[int]:
    """The group sizes that pack the most weights of a model, the largest last."""
    packed = {group: sum(layer.weight.numel() for layer in packable(model, group).values()) for group in GROUP_SIZES}
    return [group for group in GROUP_SIZES if packed[group] == max(packed.values())]


def pack(model: nn.Module, name: str, weight: Int4Weight) -> None:
    """Put a packed layer in place of the linear layer of that name, whose bias it keeps."""
    old: Any = model.get_submodule(name)
    new = PackedLinear(old.in_features, old.out_features, bias=False)
    new.bias = old.bias
    new.fill(weight)
    model.set_submodule(name, new)


def fill(model: PreTrainedModel, packed: PackedLayers, share: Callable[[str, int], slice] | None = None) -> None:
    """Pack every layer anew, one at a time; of its outputs those that `share` says, by its name and their number.
    Raises OctavoError naming what is missing, left over or misshapen."""
    layers = packed_layers(model)
    for name in sorted(packed.places.keys() - layers.keys()):
        raise Unsupported(f"{packed.places[name][0]} is quantized, and no linear layer of this model has that name.")
    outputs: dict[str, int] = {}
    for name, (source, _) in packed.places.items():
        outputs[source] = outputs.get(source, 0) + layers[name].out_features
    last, weight = "", None
    for name, layer in layers.items():
        source, rows = packed.places.get(name, (name, None))
        if weight is None or source != last:
            last, weight = source, packed.weight(source, outputs.get(source, layer.out_features), layer.in_features)
        own = weight if rows is None else weight.rows(rows)
        layer.fill(own if share is None else own.rows(share(name, layer.out_features)))


def noise(
    architecture: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, format: WeightFormat
) -> PreTrainedModel:
    """A model of random weights, of the deviation that training starts from."""
    packed = with_packed_layers(architecture, format.packs)
    if torch.empty(0).is_meta:
        model = packed._from_config(config, dtype=dtype)
    else:
        model = packed.from_pretrained(None, config=config, state_dict={}, dtype=dtype)
    scale = getattr(config, "initializer_range", 0.02) / 4.6  # 4.6: the deviation of codes 0 … 15
    for name, layer in packed_layers(model).items():
        out, columns = layer.out_features, layer.in_features
        if columns % format.group(columns):
            raise OctavoError(f"{name} has {columns} inputs, which groups of {format.group_size} do not divide.")
        groups = columns // format.group(columns)
        codes = torch.randint(16, (out, columns), dtype=torch.uint8)
        zeros = torch.randint(7, 9, (out, groups), dtype=torch.uint8)
        layer.fill(Int4Weight(codes, zeros, torch.full((out, groups), scale, dtype=torch.float16)))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model
