"""compressed-tensors, as llm-compressor writes it and vLLM reads it: `kv_cache_scheme` in config.json, and tensors
`….self_attn.k_scale` and `v_scale` beside the weights, (1,) or (kv_heads, 1, 1), x = q·scale.

fp8 is written: vLLM refuses a model whose scheme is of int8. Read are both, and vLLM's other names.
"""

from pathlib import Path
from typing import Any

from octavo.cache.plan import SIDES
from octavo.errors import OctavoError
from octavo.models.files import quantization
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.scales import checkpoint
from octavo.scales.ranges import FP8, symmetric


def write(path: Path, calibration: Calibration, model: Model) -> list[str]:
    tensors, by_head = {}, calibration.header.granularity == "head"
    for i, name in checkpoint.owners(model):
        for side in SIDES:
            scale = symmetric(calibration, i, side, FP8)
            tensors[f"{name}.{side}_scale"] = scale[:, :, None] if by_head else scale.flatten()
    scheme: dict[str, Any] = {
        "num_bits": 8,
        "type": "float",
        "strategy": "attn_head" if by_head else "tensor",
        "dynamic": False,
        "symmetric": True,
    }
    own, _ = quantization(model.path)
    config = own if own is not None and own.get("quant_method") == "compressed-tensors" else _EMPTY
    if own is not None and config is _EMPTY:
        raise OctavoError(
            f"{model.name} is quantized by {own.get('quant_method')}, and a config has room for one: export the scales "
            "of its 16-bit model"
        )
    checkpoint.write(path, model.path, tensors, {"quantization_config": {**config, "kv_cache_scheme": scheme}})
    return [
        "scales of fp8 e4m3: vLLM refuses a model with those of int8",
        f"serve with vllm serve {path} --kv-cache-dtype fp8",
    ]


_EMPTY = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "ignore": [],
    "quantization_status": "compressed",
}
