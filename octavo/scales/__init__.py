"""Other projects' scales of a KV cache, read into a calibration and written from one. A file for each format.

A scale says less than a calibration: how far K and V reach, and not what reads them. An imported calibration therefore
serves formats that need ranges alone (`int8`, `fp8`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.cache.plan import LayerShape
from octavo.errors import OctavoError
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.quant.format import Granularity
from octavo.scales import checkpoint, compressed_tensors, lmdeploy, modelopt, onnxruntime, sglang, turbomind
from octavo.scales.ranges import Layers, calibration_of, check


@dataclass(frozen=True)
class Format:
    """How one project keeps scales."""

    read: Callable[[Path, Sequence[LayerShape] | None], Layers]
    write: Callable[[Path, Calibration, Model], list[str]]  # returns what to do with it
    granularities: tuple[Granularity, ...]  # that it can hold, the usual one first
    headroom: float | None = 1.0  # that it is written with unless said otherwise; None: the calibration's


FORMATS = {
    **dict.fromkeys(
        ("compressed-tensors", "llm-compressor", "vllm"),
        Format(checkpoint.read, compressed_tensors.write, ("tensor", "head")),
    ),
    "modelopt": Format(checkpoint.read, modelopt.write, ("tensor",)),
    "onnxruntime-genai": Format(onnxruntime.read, onnxruntime.write, ("channel", "tensor"), headroom=None),
    "sglang": Format(sglang.read, sglang.write, ("tensor",)),
    "lmdeploy": Format(lmdeploy.read, lmdeploy.write, ("channel",)),
    "turbomind": Format(turbomind.read, turbomind.write, ("tensor",)),
}


def format_of(name: str) -> Format:
    if name not in FORMATS:
        raise OctavoError(f"there is no format of scales {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def read_scales(path: Path, name: str, model: Model | None = None) -> Layers:
    """All scales of a file or directory, checked; against a model, where one is given."""
    shapes = model.bound.shapes if model is not None else None
    if not path.exists():
        raise OctavoError(f"there is no {path}")
    layers = format_of(name).read(path, shapes)
    check(path, layers, shapes)
    return layers


def import_scales(path: Path, name: str, model: Model) -> Calibration:
    """A calibration of `model` from another project's scales. Raises OctavoError for scales that are not its own, not
    all there, or not valid."""
    return calibration_of(read_scales(path, name, model), model, f"{name}, {path.name}")


def export_scales(
    path: Path,
    name: str,
    model: Model,
    calibration: Calibration,
    granularity: Granularity | None = None,
    headroom: float | None = None,
) -> list[str]:
    """Write the scales of a calibration of `model` for another project; returns what to do with them there."""
    format = format_of(name)
    granularity = granularity or format.granularities[0]
    if granularity not in format.granularities:
        raise OctavoError(f"{name} holds scales per {' or '.join(format.granularities)}, not per {granularity}")
    headroom = format.headroom if headroom is None else headroom
    return format.write(path, calibration.choosing(granularity, headroom), model)
