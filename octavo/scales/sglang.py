"""The JSON of SGLang's `--quantization-param-path`, once vLLM's too: fp8 e4m3, one scale for K and V of a layer.

{"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"<rank>": {"<layer>": 0.023}}}}

With several ranks of tensor parallelism, each has its share of the KV heads in order.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from octavo.artefact import replacing
from octavo.cache.plan import SIDES, LayerShape
from octavo.errors import OctavoError
from octavo.models.files import read_json
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.scales.ranges import FP8, Found, Layers, symmetric
from octavo.scales.ranks import over_heads


def read(path: Path, shapes: Sequence[LayerShape] | None) -> Layers:
    found = read_json(path).get("kv_cache")
    if not isinstance(found, dict) or found.get("dtype") != "float8_e4m3fn":
        raise OctavoError(f"{path}: has no kv_cache of dtype float8_e4m3fn")
    try:
        ranks = {
            int(rank): {int(layer): torch.tensor([float(scale)]) for layer, scale in scales.items()}
            for rank, scales in found["scaling_factor"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise OctavoError(f"{path}: its scaling_factor is not a number for each rank and layer") from None
    layers: Layers = {}
    for layer, values in over_heads(path, ranks, shapes).items():
        one = Found.scaled(values, FP8)
        layers[layer] = {"k": one, "v": one}
    return layers


def write(path: Path, calibration: Calibration, model: Model) -> list[str]:
    scales = {
        str(i): max(symmetric(calibration, i, side, FP8).item() for side in SIDES)
        for i in range(len(calibration.layers))
    }
    document = {
        "model_type": model.bound.hf.config.model_type,
        "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": scales}},
    }
    with replacing(path) as part:
        part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return [f"serve with --kv-cache-dtype fp8_e4m3 --quantization-param-path {path}"]
