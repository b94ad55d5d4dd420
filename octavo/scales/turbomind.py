"""LMDeploy's files of the page *KV Cache Quantization and Test Results*, as its `kv_qparams` wrote them for TurboMind.

    layers.<layer>.past_kv_scale.<rank>.weight   float32, little-endian, without a header

Four numbers, k_scale k_zp v_scale v_zp, of an asymmetric code: scale = (max − min)/255 and zp = (max + min)/2, the
middle as a number. Or two, k_scale v_scale, of a symmetric one: scale = absmax/127.
"""

import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from octavo.cache.plan import SIDES, LayerShape
from octavo.errors import OctavoError
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.scales.ranges import INT8, Found, Layers, asymmetric
from octavo.scales.ranks import over_heads

NAME = re.compile(r"layers\.(\d+)\.past_kv_scale\.(\d+)\.weight")
SYMMETRIC = 127.0


def read(path: Path, shapes: Sequence[LayerShape] | None) -> Layers:
    # side → what → rank → layer → [1]
    numbers: dict[str, dict[int, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    lengths = set()
    for file in sorted(path.glob("layers.*.past_kv_scale.*.weight")) if path.is_dir() else []:
        match = NAME.fullmatch(file.name)
        data = file.read_bytes()
        if match is None or len(data) not in (8, 16):
            raise OctavoError(f"{file}: holds {len(data)} bytes, not two or four float32 numbers")
        values = torch.frombuffer(bytearray(data), dtype=torch.float32)
        lengths.add(len(values))
        names = ("k scale", "v scale") if len(values) == 2 else ("k scale", "k zero", "v scale", "v zero")
        for name, value in zip(names, values, strict=True):
            numbers[name][int(match[2])][int(match[1])] = value[None]
    if len(lengths) > 1:
        raise OctavoError(f"{path}: some files are symmetric and some are not")
    if not numbers:
        raise OctavoError(f"{path}: is no directory with files layers.0.past_kv_scale.0.weight, …")
    whole = {name: over_heads(path, ranks, shapes) for name, ranks in numbers.items()}
    if lengths == {2}:
        return {
            layer: {side: Found.scaled(whole[f"{side} scale"][layer], SYMMETRIC) for side in SIDES}
            for layer in whole["k scale"]
        }
    return {
        layer: {side: Found.scaled(whole[f"{side} scale"][layer], INT8, whole[f"{side} zero"][layer]) for side in SIDES}
        for layer in whole["k scale"]
    }


def write(path: Path, calibration: Calibration, model: Model) -> list[str]:
    path.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".scales-", dir=path) as temporary:
        for i, shape in enumerate(model.bound.shapes):
            if shape.shares is None:
                numbers = [x for side in SIDES for x in asymmetric(calibration, i, side, INT8)]
                file = Path(temporary, f"layers.{i}.past_kv_scale.0.weight")
                file.write_bytes(torch.cat([x.flatten() for x in numbers]).numpy().astype("<f4").tobytes())
        for file in Path(temporary).iterdir():
            shutil.move(file, path / file.name)
    return [f"for TurboMind with one rank: put {path} into its weights, and quant_policy = 4 into config.ini"]
