"""ONNX Runtime GenAI's JSON, as `kv_cache_scale_file` of its model builder takes it and its calibration writes it.

    {"scales": {"k_scales": […], "v_scales": […]}, "qmax": 128, "layer_ids": […]}

An entry of a layer is one scale or kv_heads·head_size of them; scale = threshold/qmax, symmetric, K after RoPE. Without
`layer_ids` they are of layers 0, 1, …; without `qmax` they are of int8. A file may have a section for each model file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.artefact import replacing
from octavo.cache.plan import SIDES, LayerShape, Side
from octavo.errors import OctavoError
from octavo.models.files import read_json
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.scales.ranges import Found, Layers, symmetric

QMAX = 128.0


def read(path: Path, shapes: Sequence[LayerShape] | None) -> Layers:
    document = read_json(path)
    if "scales" not in document:  # a section for each model file
        document = next((part for part in document.values() if isinstance(part, dict) and "scales" in part), {})
    try:
        scales: dict[str, list[Any]] = {side: list(document["scales"][f"{side}_scales"]) for side in SIDES}
        layers = [int(i) for i in document.get("layer_ids") or range(len(scales["k"]))]
        qmax = float(document.get("qmax") or QMAX)
    except (KeyError, TypeError, ValueError):
        raise OctavoError(f"{path}: has no scales.k_scales and scales.v_scales") from None
    if len(set(layers)) != len(layers) or any(len(values) != len(layers) for values in scales.values()):
        raise OctavoError(f"{path}: has scales of K and V for other layers than it names")
    return {
        layer: {side: Found.scaled(_entry(path, layer, scales[side][at], shapes), qmax) for side in SIDES}
        for at, layer in enumerate(layers)
    }


def _entry(path: Path, layer: int, value: Any, shapes: Sequence[LayerShape] | None) -> Tensor:
    try:
        values = torch.tensor(value, dtype=torch.float32).flatten()
    except (TypeError, ValueError):
        raise OctavoError(f"{path}: the scales of layer {layer} are not numbers") from None
    heads = shapes[layer].kv_heads if shapes is not None and 0 <= layer < len(shapes) else 1
    if values.numel() == 1 or values.numel() % heads:
        return values.view(1, -1)
    return values.view(heads, -1)


def write(path: Path, calibration: Calibration, model: Model) -> list[str]:
    by_channel = calibration.header.granularity == "channel"
    owners = [i for i, shape in enumerate(model.bound.shapes) if shape.shares is None]

    def entry(layer: int, side: Side) -> Any:
        scale = symmetric(calibration, layer, side, QMAX).flatten().tolist()
        return scale if by_channel else scale[0]

    document = {
        "scales": {f"{side}_scales": [entry(layer, side) for layer in owners] for side in SIDES},
        "qmax": int(QMAX),
        "layer_ids": owners,
    }
    with replacing(path) as part:
        part.write_text(json.dumps(document) + "\n", encoding="utf-8")
    scheme = "int8_per_channel" if by_channel else "int8_per_tensor"
    return [f"build with --extra_options kv_cache_quant_scheme={scheme} kv_cache_scale_file={path}"]
