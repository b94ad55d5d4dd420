"""Checkpoints with 4-bit weights: what their config says, and each layer's tensors checked by name.

AWQ, GPTQ and compressed-tensors are read. Anything else is refused, naming what was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.errors import OctavoError, Unsupported
from octavo.weights.layouts import AWQ, COMPRESSED, COMPRESSED_SYMMETRIC, GPTQ, GPTQ_V2, Int4Weight, WeightLayout

_ORDER = {"g_idx", "weight_g_idx"}  # which group a column belongs to: columns in the order of their importance
_FLOATS = {torch.float16, torch.bfloat16, torch.float32}
_TYPES = {"scales": _FLOATS, "weight_scale": _FLOATS, "weight_shape": {torch.int32, torch.int64}}


@dataclass(frozen=True)
class WeightFormat:
    """How a checkpoint stores the weights of its linear layers."""

    method: str  # as `quant_method` names it
    layout: WeightLayout
    group_size: int | None  # None: a whole row
    kept: tuple[str, ...] = ()  # layers that are not quantized: parts of their names, or `re:` and a pattern

    def packs(self, layer: str) -> bool:
        """Whether the config says that the linear layer of this name is quantized."""
        return not any(
            re.match(name[3:], layer) if name.startswith("re:") else name in layer for name in self.kept if name
        )

    def group(self, columns: int) -> int:
        return self.group_size or columns


def read_format(found: dict[str, Any], where: str) -> WeightFormat:
    """What a `quantization_config` describes. Raises Unsupported, naming what was found in `where`, if it is not 4-bit
    AWQ (gemm), GPTQ, or compressed-tensors `pack-quantized`."""
    method = found.get("quant_method", "gptq" if "desc_act" in found else "awq")
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}
    if method not in readers:
        raise Unsupported(
            f"{where} holds weights quantized with {method}: 4-bit weights of AWQ, GPTQ and compressed-tensors are "
            "read, so name one of those or the 16-bit model."
        )
    return readers[method](found, where)


def _awq(found: dict[str, Any], where: str) -> WeightFormat:
    _refuse(where, "awq", "version", str(found.get("version", "gemm")).lower(), "gemm")
    group = _sizes(
        where, "awq", found.get("bits", found.get("w_bit")), found.get("group_size", found.get("q_group_size"))
    )
    return WeightFormat("awq", AWQ, group, ("lm_head", *(found.get("modules_to_not_convert") or ())))


def _gptq(found: dict[str, Any], where: str) -> WeightFormat:
    version = str(found.get("checkpoint_format") or "gptq").lower()
    _refuse(where, "gptq", "checkpoint_format", version, "gptq", "gptq_v2")
    group = _sizes(where, "gptq", found.get("bits"), found.get("group_size"))
    kept = () if found.get("lm_head") else ("lm_head",)
    return WeightFormat("gptq", GPTQ if version == "gptq" else GPTQ_V2, group, kept)


def _compressed(found: dict[str, Any], where: str) -> WeightFormat:
    name = "compressed-tensors"
    _refuse(where, name, "format", found.get("format"), "pack-quantized")
    _refuse(where, name, "kv_cache_scheme", found.get("kv_cache_scheme"), None)
    _refuse(where, name, "transform_config", bool(found.get("transform_config")), False)
    sparsity = (found.get("sparsity_config") or {}).get("format", "dense")
    _refuse(where, name, "sparsity_config", sparsity, "dense")
    groups = list((found.get("config_groups") or {}).values())
    _refuse(where, name, "number of config_groups", len(groups), 1)
    _refuse(where, name, "targets", groups[0].get("targets"), ["Linear"])
    _refuse(where, name, "input_activations", groups[0].get("input_activations"), None)
    weights = groups[0].get("weights") or {}
    _refuse(where, name, "type", weights.get("type", "int"), "int")
    _refuse(where, name, "strategy", weights.get("strategy", "group"), "group", "channel")
    _refuse(where, name, "actorder", weights.get("actorder"), None, False, "static", "weight", "group")
    whole = weights.get("strategy") == "channel"
    group = _sizes(where, name, weights.get("num_bits"), -1 if whole else weights.get("group_size"))
    layout = COMPRESSED_SYMMETRIC if weights.get("symmetric", True) else COMPRESSED
    ignored = [layer if layer.startswith("re:") else f"re:{re.escape(layer)}$" for layer in found.get("ignore") or ()]
    return WeightFormat(name, layout, group, tuple(ignored))


def _refuse(where: str, method: str, key: str, value: Any, *wanted: Any) -> None:
    if value not in wanted:
        choices = " or ".join(str(choice) for choice in wanted)
        raise Unsupported(f"{where}: {method} weights with {key} {value} are not supported, only with {choices}.")


def _sizes(where: str, method: str, bits: Any, group: Any) -> int | None:
    """The group size, None for a whole row."""
    _refuse(where, method, "bits", bits, 4)
    if not isinstance(group, int) or (group != -1 and (group <= 0 or group % 16)):
        raise Unsupported(
            f"{where}: {method} weights in groups of {group} are not supported, only in multiples of 16, or -1."
        )
    return None if group == -1 else group


@dataclass
class PackedLayers:
    """The quantized layers of a checkpoint, still as its tensors."""

    format: WeightFormat
    tensors: dict[str, dict[str, Tensor]]  # layer → name after the layer → tensor
    places: dict[str, tuple[str, Tensor | None]]  # the model's layer → the checkpoint's, and its rows there or None

    @classmethod
    def take(cls, format: WeightFormat, tensors: dict[str, Tensor]) -> PackedLayers:
        """Move those of `tensors` that belong to quantized layers."""
        names = set(format.layout.shapes(16, 16, 16)) | _ORDER
        found: dict[str, dict[str, Tensor]] = {}
        for name in list(tensors):
            layer, _, last = name.rpartition(".")
            if last in names:
                found.setdefault(layer, {})[last] = tensors.pop(name)
        return cls(format, found, {layer: (layer, None) for layer in found})

    def rename(self, parts: Callable[[str], Mapping[str, Tensor | None]]) -> None:
        """Where the model's layers are others: `parts` says what a checkpoint's layer becomes, with which rows."""
        self.places = {name: (layer, rows) for layer in self.tensors for name, rows in parts(layer).items()}

    def packs(self, layer: str, plain: Set[str]) -> bool:
        """Whether a layer of the model is quantized: so say its tensors, or else the config and no `plain` tensor."""
        return layer in self.places or (self.format.packs(layer) and f"{layer}.weight" not in plain)

    def idle(self, plain: Mapping[str, Tensor]) -> set[str]:
        """Biases of zeros, which GPTQ checkpoints hold for layers that have none."""
        biases = {f"{layer}.bias" for layer in self.places} & plain.keys()
        return {name for name in biases if not plain[name].any()}

    def weight(self, layer: str, out: int, columns: int) -> Int4Weight:
        """The layer's weight [out, columns]. Raises OctavoError naming a tensor that is missing or does not fit."""
        found, group = self.tensors.get(layer, {}), self.format.group(columns)
        if columns % group:
            raise OctavoError(f"{layer} has {columns} inputs, which groups of {group} do not divide.")
        if out % self.format.layout.multiple[0] or columns % self.format.layout.multiple[1]:
            raise OctavoError(
                f"{layer} of {columns} inputs and {out} outputs cannot be packed as {self.format.method}."
            )
        shapes = self.format.layout.shapes(out, columns, group)
        for name, shape in shapes.items():
            if name not in found:
                raise OctavoError(f"The weights lack {layer}.{name}: fetch config.json and the weights again.")
            tensor = found[name]
            if tuple(tensor.shape) != shape or tensor.dtype not in _TYPES.get(name, {torch.int32}):
                raise OctavoError(
                    f"The tensor {layer}.{name} is {tensor.dtype} {tuple(tensor.shape)} instead of {shape}, in groups "
                    f"of {group}: fetch config.json and the weights again."
                )
        groups = self._check(layer, found, out, columns, group)
        weight = self.format.layout.unpack(found)
        if groups is not None:
            weight = weight.sorted_by(groups)
        if not weight.scales.isfinite().all():
            raise OctavoError(f"The scales of {layer} are not all finite: fetch the weights again.")
        return weight

    def _check(self, layer: str, found: Mapping[str, Tensor], out: int, columns: int, group: int) -> Tensor | None:
        """What shapes do not tell; the group of each column, if they are in no order."""
        shape = found.get("weight_shape")
        if shape is not None and shape.tolist() != [out, columns]:
            raise OctavoError(f"The tensor {layer}.weight_shape says {shape.tolist()}, which the packed one is not.")
        in_order = torch.arange(columns) // group
        for name in _ORDER & found.keys():
            groups = found[name].long()
            if groups.shape != (columns,) or not torch.equal(groups.sort().values, in_order):
                raise OctavoError(f"The tensor {layer}.{name} does not put {group} columns into each group.")
            if not torch.equal(groups, in_order):
                return groups
        return None
