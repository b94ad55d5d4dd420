"""NVIDIA Model Optimizer: `….k_proj.k_scale` and `….v_proj.v_scale` = absmax/448 beside the weights, and
`hf_quant_config.json`. Its affine formats add `k_bias` and `v_bias`.

The weights of such a model are in 16 bits, so `quant_algo` is null. TensorRT-LLM takes that; to vLLM 0.33 and SGLang
0.5.23 it is a model without any quantization, and they leave the scales out.
"""

from pathlib import Path
from typing import Any

from octavo.cache.plan import SIDES
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.scales import checkpoint
from octavo.scales.ranges import FP8, symmetric


def write(path: Path, calibration: Calibration, model: Model) -> list[str]:
    tensors = {
        f"{name}.{side}_proj.{side}_scale": symmetric(calibration, i, side, FP8).view(())
        for i, name in checkpoint.owners(model)
        for side in SIDES
    }
    document: dict[str, Any] = {
        "producer": {"name": "octavo"},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": []},
    }
    checkpoint.write(path, model.path, tensors, {}, {"hf_quant_config.json": document})
    return [
        f"for TensorRT-LLM, from {path}",
        "vLLM and SGLang read these scales beside weights that ModelOpt quantized too: for them export --as vllm",
    ]
