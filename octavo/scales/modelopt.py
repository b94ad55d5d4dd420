"""NVIDIA Model Optimizer: `….k_proj.k_scale` and `….v_proj.v_scale` = absmax/448 beside the weights, and
`hf_quant_config.json`, which TensorRT-LLM, vLLM and SGLang read. Its affine formats add `k_bias` and `v_bias`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.models.hook import attention_modules
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.scales import checkpoint
from octavo.scales.checkpoint import read
from octavo.scales.found import FP8, SIDES, Choice

__all__ = ["GRANULARITIES", "HEADROOM", "read", "write"]

GRANULARITIES = ("tensor",)
HEADROOM = 1.0  # absmax/448


def write(path: Path, calibration: Calibration, choice: Choice, model: Model) -> list[str]:
    names = {id(module): name for name, module in model.bound.hf.named_modules()}
    tensors = {
        f"{names[id(module)]}.{side}_proj.{side}_scale": choice.symmetric(calibration.layers[i][side], FP8).view(())
        for i, module in attention_modules(model.bound.hf).items()
        for side in SIDES
        if model.bound.shapes[i].shares is None
    }
    document: dict[str, Any] = {
        "producer": {"name": "octavo"},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": []},
    }
    checkpoint.write(path, model.path, tensors, {}, {"hf_quant_config.json": document})
    return [f"serve with --kv-cache-dtype fp8, from {path}"]
