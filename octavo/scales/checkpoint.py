"""Scales that lie as tensors beside a checkpoint's weights: read under any of the names that vLLM reads, and written in
a copy of the checkpoint that shares its weights."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from octavo.cache.plan import SIDES, LayerShape, Side
from octavo.errors import OctavoError, one_line, require_new
from octavo.models.files import read_json, weight_files
from octavo.models.hook import attention_modules
from octavo.models.model import Model
from octavo.scales.ranges import FP8, INT8, Found, Layers

LAYER = re.compile(r"\.(?:layers|layer|h|blocks)\.(\d+)\.")
# What follows the layer's number, by the projects that write it. A capture says the side; without one it is both.
SPELLINGS = (
    r"\.([kv])_scale$",  # compressed-tensors, llm-compressor; vLLM's own self_attn.attn.k_scale; qkv_proj.k_scale
    r"\.([kv])_proj\.[kv]_scale$",  # ModelOpt; mixer.k_proj.k_scale
    r"\.([kv])_proj\.output_scale$",  # older llm-compressor, Quark
    r"\.([kv])_cache\.scale$",
    r"\.kv_scale$",  # the first of vLLM
    r"\.kv_cache_scaling_factor$",  # TensorRT-LLM
)
BIAS = re.compile(r"\.([kv])_proj\.[kv]_bias$")  # ModelOpt's affine formats
ZERO_POINT = re.compile(r"\.([kv])_zero_point$")
SCALES = "model-kv-scales.safetensors"
# transformers reads a file of this name alone, whatever the index says.
SINGLE, RENAMED = "model.safetensors", "model-weights.safetensors"


def read(path: Path, shapes: Sequence[LayerShape] | None) -> Layers:
    """Scales of the checkpoint in directory `path`, or in one safetensors file."""
    levels = FP8
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme") or {}
        if scheme.get("type") == "int":
            levels = INT8
        if scheme.get("num_bits", 8) != 8 or scheme.get("dynamic", False):
            raise OctavoError(f"{path}: its kv_cache_scheme is not of 8 static bits")
    else:
        files = [path] if path.is_file() else []
    scales: dict[tuple[int, Side], Tensor] = {}
    zeros: dict[tuple[int, Side], Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    layer = LAYER.search(f".{name}")
                    if layer is None:
                        continue
                    number = int(layer[1])
                    if side := _side(name):
                        for each in SIDES if side == "both" else (side,):
                            scales[number, each] = tensors.get_tensor(name).float()
                    elif bias := BIAS.search(name):
                        zeros[number, bias[1]] = tensors.get_tensor(name).float()  # type: ignore[index]
                    elif ZERO_POINT.search(name) and bool(tensors.get_tensor(name).any()):
                        raise OctavoError(f"{file}: {name} is not 0: codes about another zero are not read")
        except SafetensorError as error:
            raise OctavoError(f"{file}: incomplete or corrupted ({one_line(error)})") from None
    layers: Layers = {}
    for (number, side), scale in scales.items():
        shape = shapes[number] if shapes is not None and number < len(shapes) else None
        zero = zeros.get((number, side))
        laid = _laid(scale, shape)
        laid_zero = None if zero is None else _laid(zero, shape)
        if laid_zero is not None:
            laid, laid_zero = torch.broadcast_tensors(laid, laid_zero)
        layers.setdefault(number, {})[side] = Found.scaled(laid, levels, laid_zero)
    return layers


def _side(name: str) -> Any:
    """k, v or both; None if the tensor is no scale of a KV cache."""
    for spelling in SPELLINGS:
        if match := re.search(spelling, name):
            return match[1] if match.re.groups else "both"
    return None


def _laid(x: Tensor, shape: LayerShape | None) -> Tensor:
    """(1,), (heads, 1, 1), (heads·dim,) … as [1 or heads, 1 or dim]."""
    if x.numel() == 1:
        return x.view(1, 1)
    heads = shape.kv_heads if shape is not None else x.shape[0]
    return x.reshape(heads, -1) if x.numel() % heads == 0 else x.reshape(1, -1)


def write(
    path: Path,
    source: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """A new directory `path`: the checkpoint in `source` with `tensors` in a file of their own and `config` in its
    config.json, and JSON documents `more` by name. Weights are linked, not copied, where the file system can."""
    require_new(path, source)
    weights = weight_files(source)
    if any(file.suffix != ".safetensors" for file in weights):
        raise OctavoError(f"{source} has its weights in .bin files: only those of safetensors can be given scales")
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        new = Path(temporary, "model")
        new.mkdir()
        written = {"config.json", "model.safetensors.index.json", SCALES, *(more or {})}
        for file in source.iterdir():
            if file.is_file() and file.name not in written:
                _link(file, new / (RENAMED if file.name == SINGLE else file.name))
        index: dict[str, str] = {}
        total = 0
        for file in weights:
            with safe_open(file, framework="pt") as names:
                index |= dict.fromkeys(names.keys(), RENAMED if file.name == SINGLE else file.name)
            total += file.stat().st_size
        save_file({name: x.contiguous() for name, x in tensors.items()}, new / SCALES, {"format": "pt"})
        index |= dict.fromkeys(tensors, SCALES)
        documents = {
            "config.json": read_json(source / "config.json") | dict(config),
            "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": index},
            **(more or {}),
        }
        for name, document in documents.items():
            (new / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if path.exists():
            path.rmdir()  # empty
        new.rename(path)


def owners(model: Model) -> Iterator[tuple[int, str]]:
    """The layers that have K and V of their own, by number, and the names of their attention modules."""
    names = {id(module): name for name, module in model.bound.hf.named_modules()}
    for i, module in attention_modules(model.bound.hf).items():
        if model.bound.shapes[i].shares is None:
            yield i, names[id(module)]


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file.resolve(), to)
    except OSError:  # another file system
        shutil.copyfile(file, to)
