"""How many values of K and V would leave the calibrated range, by layer and headroom: one pass for all headrooms."""

from collections.abc import Sequence

from torch import Tensor

from octavo.engine.reading import Reading
from octavo.models.bind import BoundModel
from octavo.quant.calibration import Calibration
from octavo.quant.codec import Static, encode
from octavo.quant.format import KVFormat

Shares = dict[float, list[tuple[float, float]]]  # headroom → (K, V) of each layer


def saturation(
    bound: BoundModel,
    calibration: Calibration,
    windows: Sequence[Sequence[int]],
    headrooms: Sequence[float],
) -> Shares:
    """Share of values that int8 would clip. K and V are those of the unquantized model."""
    int8 = KVFormat.parse("int8").k
    layers = range(len(bound.layers))

    def static(layer: int, side: str, headroom: float) -> Static:
        return calibration.choosing(headroom=headroom).static(layer, side, int8).to(bound.layers[layer].shape.device)

    statics = {headroom: [[static(i, side, headroom) for side in "kv"] for i in layers] for headroom in headrooms}
    clipped = {headroom: [[0, 0] for _ in layers] for headroom in headrooms}
    values = [[0, 0] for _ in layers]

    def observe(layer: int, _q: Tensor, k: Tensor, v: Tensor) -> None:
        for side, x in enumerate((k, v)):
            values[layer][side] += x.numel()
            for headroom, own in statics.items():
                rows = encode(x, int8, own[layer][side])
                clipped[headroom][layer][side] += int(rows.saturated)  # type: ignore[arg-type]  # int8 counts

    reading = Reading(bound)
    for window in windows:
        reading.run(window, observe)
    return {
        headroom: [(own[0] / n[0], own[1] / n[1]) for own, n in zip(counts, values, strict=True)]
        for headroom, counts in clipped.items()
    }
