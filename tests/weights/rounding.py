"""4-bit checkpoints for the tests: weights rounded to nearest, written in any layout beside what they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.weights.layouts import AWQ, COMPRESSED, COMPRESSED_SYMMETRIC, GPTQ, GPTQ_V2, SYMMETRIC, Int4Weight

LAYOUTS = {
    "awq": AWQ,
    "gptq": GPTQ,
    "gptq_v2": GPTQ_V2,
    "compressed": COMPRESSED,
    "compressed symmetric": COMPRESSED_SYMMETRIC,
}


def rounded(weight: Tensor, group: int, symmetric: bool = False) -> Int4Weight:
    """[out, in] by the range of each group of a row."""
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        scale = (groups.abs().amax(-1, keepdim=True) / 7.5).half()
        zero = torch.full_like(low, SYMMETRIC)
    else:
        scale = ((high - low) / 15).clamp(min=1e-6).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (groups / scale.float() + zero).round().clamp(0, 15).to(torch.uint8)
    return Int4Weight(codes.flatten(1), zero[..., 0].to(torch.uint8), scale[..., 0])


def described(name: str, group: int) -> dict[str, Any]:
    """The `quantization_config` of a layout."""
    if name == "awq":
        return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True}
    if name.startswith("gptq"):
        return {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "checkpoint_format": name}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    weights["symmetric"] = "symmetric" in name
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def packed(
    tensors: dict[str, Tensor], name: str, group: int, ends: tuple[str, ...] = ("_proj.weight",)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a 4-bit checkpoint, and those of the model that it stands for."""
    stored, meant = {}, {}
    for key, tensor in tensors.items():
        stored[key] = meant[key] = tensor
        if key.endswith(ends):
            weight = rounded(tensor, group, "symmetric" in name)
            meant[key] = weight.dequantize().to(tensor.dtype)
            del stored[key]
            stored |= {f"{key[:-6]}{last}": value for last, value in LAYOUTS[name].pack(weight).items()}
    return stored, meant


def write(
    path: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1, kind: str = "safetensors"
) -> Path:
    """A checkpoint's directory."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    files = [f"{stem}.{suffix}"]
    if shards > 1:
        files = [f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor.contiguous().clone() for name, tensor in tensors.items() if where[name] == file}
        save_file(part, path / file) if kind == "safetensors" else torch.save(part, path / file)
    if shards > 1:
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path
