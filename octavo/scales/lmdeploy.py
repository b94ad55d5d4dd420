"""What `lmdeploy lite calibrate` left in its work directory until July 2024: `key_stats.pth` and `value_stats.pth`.

Each is a dict of `max`, `min` and `absmax`, and of each a dict from a layer's module name (`model.layers.0`) to float16
[kv_heads, head_dim], K after RoPE.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from octavo.artefact import replacing
from octavo.cache.plan import LayerShape, Side
from octavo.errors import OctavoError
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.scales.ranges import Found, Layers

FILES: dict[Side, str] = {"k": "key_stats.pth", "v": "value_stats.pth"}


def read(path: Path, shapes: Sequence[LayerShape] | None) -> Layers:  # noqa: ARG001
    layers: Layers = {}
    for side, name in FILES.items():
        file = path / name
        if not file.is_file():
            raise OctavoError(f"{path}: has no {name}")
        try:
            statistics: Any = torch.load(file, map_location="cpu", weights_only=True)
            low, high = statistics["min"], statistics["max"]
            for layer in {*low, *high}:
                number = int(re.findall(r"\d+", layer)[-1])
                found = Found(low[layer].float(), high[layer].float())
                if found.low.dim() != 2 or found.low.shape != found.high.shape:
                    raise TypeError
                layers.setdefault(number, {})[side] = found
        except Exception:  # unpickling fails in any way a byte can be wrong
            raise OctavoError(f"{file}: is incomplete or corrupted, or not LMDeploy's statistics of K and V") from None
    return layers


def write(path: Path, calibration: Calibration, model: Model) -> list[str]:  # noqa: ARG001
    path.mkdir(parents=True, exist_ok=True)
    documents = {}
    for side, name in FILES.items():
        kept: dict[str, dict[str, torch.Tensor]] = {"max": {}, "min": {}, "absmax": {}}
        for i, sides in enumerate(calibration.layers):
            low, high = sides[side]["min"], sides[side]["max"]
            for key, x in {"max": high, "min": low, "absmax": torch.maximum(low.abs(), high.abs())}.items():
                kept[key][f"model.layers.{i}"] = x.half()
                if not bool(x.half().isfinite().all()):
                    raise OctavoError(f"layer {i} has values beyond 65504, the largest of LMDeploy's float16")
        documents[path / name] = kept
    for file, document in documents.items():
        with replacing(file) as part:
            torch.save(document, part)
    return ["for LMDeploy up to 0.4: lmdeploy lite kv_qparams"]
