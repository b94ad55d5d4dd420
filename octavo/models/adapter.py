"""LoRA adapters: a directory with adapter_config.json, merged into its base model when that is loaded.

    W + s·B·A        s = lora_alpha/r, or lora_alpha/√r with use_rslora

What is not plain LoRA is refused by name: merge it with peft first.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from octavo.errors import OctavoError, Unsupported
from octavo.models.files import adapter_config, open_tensors

FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# Settings that change what an adapter computes, and the values with which it is plain LoRA.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "arrow_config": (None,),
}


def adapter_file(path: Path) -> Path:
    """The weights of the adapter in a directory. Raises OctavoError where there are none."""
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        raise OctavoError(f"{path} holds no {FILES[0]}: download the adapter's weights.")
    return found


@torch.no_grad()
def merge(model: PreTrainedModel, path: Path) -> None:
    """Add the adapter in `path` to the weights of its base model, which are plain. Raises OctavoError for what does not
    fit, Unsupported for what is not plain LoRA."""
    config = adapter_config(path)
    for name, plain in PLAIN.items():
        if config.get(name, plain[-1]) not in plain:
            raise Unsupported(
                f"{path} is an adapter with {name} {config[name]!r}, which Octavo does not merge. Merge it with peft: "
                f"AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload().save_pretrained(NEW)"
            )
    tensors = open_tensors(adapter_file(path))
    modules = dict(model.named_modules())
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name.removeprefix(PREFIX))
        if found is not None:
            parts.setdefault(found[1], {})[found[2]] = tensor
        else:
            _replace(modules, name.removeprefix(PREFIX).replace(".modules_to_save", ""), tensor, path)
    if not parts:
        raise OctavoError(f"{path} holds no LoRA weights: download the adapter again.")
    for name, pair in parts.items():
        module = modules.get(name)
        if module is None or pair.keys() != {"A", "B"} or not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            raise OctavoError(f"{path} holds LoRA weights for {name}, which the base model does not have.")
        rank = pair["A"].shape[1] if isinstance(module, nn.Embedding) and pair["A"].shape[0] > pair["A"].shape[1] else 0
        rank = rank or pair["A"].shape[0]
        change = _scale(config, name, rank) * (pair["B"].float() @ pair["A"].float())
        if isinstance(module, nn.Embedding | Conv1D):
            change = change.T
        if change.shape != module.weight.shape:
            raise OctavoError(
                f"{path} changes {name} in the shape {tuple(change.shape)}, and the base model's weight is "
                f"{tuple(module.weight.shape)}: name the base model that it was made for."
            )
        module.weight.copy_(module.weight.float() + change.to(module.weight.device))


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(patterns: Any, name: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as peft matches them."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _replace(modules: dict[str, nn.Module], name: str, tensor: Tensor, path: Path) -> None:
    """A weight that the adapter holds whole (modules_to_save)."""
    layer, _, last = name.rpartition(".")
    old = getattr(modules.get(layer), last, None)
    if not isinstance(old, Tensor) or old.shape != tensor.shape:
        raise OctavoError(f"{path} holds {name}, which does not fit the base model: name the one that it was made for.")
    old.copy_(tensor)
