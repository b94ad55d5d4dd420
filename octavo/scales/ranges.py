"""What another project's file says of one side of one layer, and what becomes of it: a calibration of ranges alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo.cache.plan import SIDES, LayerShape, Side
from octavo.errors import OctavoError
from octavo.models.model import Model
from octavo.quant.calibration import Calibration, Header
from octavo.quant.format import Granularity
from octavo.quant.statistics import largest_of

INT8 = 127.5  # |x|/scale at the end of the range where codes are −128 … 127 about a middle
FP8 = 448.0  # the largest number of float8_e4m3fn

Layers = dict[int, dict[Side, "Found"]]


@dataclass(frozen=True)
class Found:
    """x lies in zero ± levels·scale, or in low … high where a format keeps ranges. All float32, [1, 1] for a layer,
    [kv_heads, 1] for each head, [kv_heads, dim] for each channel."""

    low: Tensor
    high: Tensor
    scale: Tensor | None = None
    levels: float = 0.0
    zero: Tensor | None = None

    @classmethod
    def scaled(cls, scale: Tensor, levels: float, zero: Tensor | None = None) -> Found:
        scale = scale.float()
        middle = torch.zeros_like(scale) if zero is None else zero.float()
        return cls(middle - levels * scale, middle + levels * scale, scale, levels, middle)

    @property
    def granularity(self) -> Granularity:
        return "channel" if self.low.shape[1] > 1 else "head" if self.low.shape[0] > 1 else "tensor"

    def over(self, heads: int, dim: int) -> dict[str, Tensor]:
        """The statistics of a calibration, [heads, dim] each."""
        found = {"min": self.low, "max": self.high}
        if self.scale is not None and self.zero is not None:
            found |= {"scale": self.scale, "zero": self.zero, "levels": torch.full_like(self.scale, self.levels)}
        return {name: x.expand(heads, dim).contiguous() for name, x in found.items()}


def check(path: Path, layers: Layers, shapes: Sequence[LayerShape] | None) -> None:
    """Raise OctavoError, which names the first layer, unless the scales are whole, valid, and those of a model of these
    shapes, where they are known."""
    if not layers:
        raise OctavoError(f"{path}: holds no scales of a KV cache")
    count = len(shapes) if shapes is not None else max(layers) + 1
    if max(layers) >= count:
        raise OctavoError(f"{path}: has scales of layer {max(layers)}, and the model has {count} layers")
    for i in range(count):
        shape = shapes[i] if shapes is not None else None
        if shape is not None and shape.shares is not None:
            continue
        for side in SIDES:
            found = layers.get(i, {}).get(side)
            if found is None:
                raise OctavoError(f"{path}: the {side.upper()} scale of layer {i} is missing")
            _check_side(f"{path}: the {side.upper()} scale of layer {i}", found, shape, side)
    every = [found.scale for sides in layers.values() for found in sides.values() if found.scale is not None]
    if every and all(bool((scale == 1).all()) for scale in every):
        raise OctavoError(f"{path}: all scales are exactly 1.0, which tells nothing: nobody has calibrated this model")


def _check_side(what: str, found: Found, shape: LayerShape | None, side: Side) -> None:
    values = [x for x in (found.low, found.high, found.scale) if x is not None]
    if not all(bool(x.isfinite().all()) for x in values):
        raise OctavoError(f"{what} is not a finite number")
    if found.scale is not None and bool((found.scale <= 0).any()):
        raise OctavoError(f"{what} is {found.scale.min().item():g}: scales are above 0")
    if bool((found.low > found.high).any()):
        raise OctavoError(f"{what} has a range that ends below its begin")
    if shape is not None:
        heads, dim = shape.kv_heads, shape.dim(side)
        if found.low.shape not in ((1, 1), (heads, 1), (heads, dim)):
            raise OctavoError(
                f"{what} is of shape {list(found.low.shape)}, and the model has {heads} KV heads of {dim}"
            )


def calibration_of(layers: Layers, model: Model, source: str) -> Calibration:
    """The scales as a calibration of `model`: ranges, which were widened already where they were to be."""
    shapes = model.bound.shapes
    sides: list[dict[str, dict[str, Tensor]]] = []
    for i, shape in enumerate(shapes):
        own = layers[i if shape.shares is None else shape.shares]
        sides.append({side: own[side].over(shape.kv_heads, shape.dim(side)) for side in SIDES})
    found = {f.granularity for own in layers.values() for f in own.values()}
    finest: Granularity = "channel" if "channel" in found else "head" if "head" in found else "tensor"
    header = Header(
        fingerprint=model.fingerprint,
        dataset=f"imported: {source}",
        samples=0,
        seqlen=0,
        tokens=0,
        positions=(0, model.bound.max_context - 1),
        granularity=finest,
        headroom=1.0,
        rotary=model.bound.rotary,
    )
    return Calibration(header, sides)


def symmetric(calibration: Calibration, layer: int, side: Side, levels: float) -> Tensor:
    """scale = headroom·absmax/levels, [1, 1], [kv_heads, 1] or [kv_heads, dim], as the calibration chooses. What was
    imported and is asked for as it was comes back unchanged."""
    how, statistics = calibration.header, calibration.layers[layer][side]
    scale, own = statistics.get("scale"), statistics.get("levels")
    if scale is not None and own is not None and not bool(statistics["zero"].any()):
        given = largest_of(scale, how.granularity)
        factor = how.headroom * own.flatten()[0].item() / levels
        return given if factor == 1 else (given.double() * factor).float()
    widest = largest_of(torch.maximum(statistics["min"].abs(), statistics["max"].abs()), how.granularity)
    return (widest.double() * (how.headroom / levels)).float().clamp(min=1e-30)


def asymmetric(calibration: Calibration, layer: int, side: Side, levels: float) -> tuple[Tensor, Tensor]:
    """scale = headroom·(max − min)/(2·levels) and zero = (min + max)/2."""
    how, statistics = calibration.header, calibration.layers[layer][side]

    def over(x: Tensor) -> Tensor:
        return largest_of(x, how.granularity)

    own = statistics.get("levels")
    if own is not None and own.flatten()[0].item() == levels and how.headroom == 1:
        scale, zero = statistics["scale"], statistics["zero"]
        if all(bool((x == over(x)).all()) for x in (scale, zero)):  # one value in each part that gets one
            return over(scale), over(zero)
    low, high = -over(-statistics["min"]).double(), over(statistics["max"]).double()
    return ((high - low) * (how.headroom / (2 * levels))).float().clamp(min=1e-30), ((low + high) / 2).float()
