"""4-bit checkpoints for the tests: weights rounded to nearest, written in any layout beside what they stand for, by
packers written here from the formats' documentation, number by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
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


def words(rows: list[list[int]]) -> torch.Tensor:
    """Lists of eights of 4-bit numbers as int32, first number lowest."""
    numbers = [
        [sum(n << 4 * i for i, n in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)] for row in rows
    ]
    return torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.int32))


def padded(row: list[int]) -> list[int]:
    return row + [0] * (-len(row) % 8)


def awq(weight: Int4Weight) -> dict[str, torch.Tensor]:
    """AutoAWQ, gemm: words along out, interleaved."""

    def interleaved(row: list[int]) -> list[int]:
        return [row[at + place] for at in range(0, len(row), 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]

    return {
        "qweight": words([interleaved(row) for row in weight.codes.T.tolist()]),
        "qzeros": words([interleaved(row) for row in weight.zeros.T.tolist()]),
        "scales": weight.scales.T,
    }


def gptq(weight: Int4Weight, less: int) -> dict[str, torch.Tensor]:
    """GPTQ: codes in words along in, zeros along out; version 1 stores a zero less one."""
    return {
        "qweight": words(weight.codes.tolist()).T,
        "qzeros": words([[(zero - less) % 16 for zero in row] for row in weight.zeros.T.tolist()]),
        "scales": weight.scales.T,
    }


def compressed(weight: Int4Weight, symmetric: bool) -> dict[str, torch.Tensor]:
    """compressed-tensors pack-quantized: signed numbers −8 … 7 stored as number + 8."""
    signed = weight.codes.int() - 8
    tensors = {
        "weight_packed": words([padded([n + 8 for n in row]) for row in signed.tolist()]),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words([padded(row) for row in weight.zeros.T.tolist()]).T
    return tensors


PACKED = {
    "awq": awq,
    "gptq": lambda weight: gptq(weight, 1),
    "gptq_v2": lambda weight: gptq(weight, 0),
    "compressed": lambda weight: compressed(weight, False),
    "compressed symmetric": lambda weight: compressed(weight, True),
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
            stored |= {f"{key[:-6]}{last}": value for last, value in PACKED[name](weight).items()}
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
