"""How much each layer's K and each layer's V lose in few bits, by the KL divergence at the model's output.

One side of one layer at a time is stored in 4 bits, with edges, and all else as the model computes it. 8 bits lose a
hundred times less, so little that one side alone can hardly be told from rounding: they are measured in all layers at
once, and the sum is shared out as 4 bits share theirs. A code's error is the same noise, 16 times as small, and is read
in the same way.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from octavo.cache.plan import SIDES, Side
from octavo.engine.reading import Reading
from octavo.measure.accuracy.compare import losses
from octavo.models.bind import BoundModel
from octavo.quant.calibration import Calibration
from octavo.quant.format import CODECS, SPAN, Codec, KVFormat

FEW, MORE = CODECS["int4-token"], CODECS["int8-token"]
UNIFORM = ("kv8", "k8v4", "kv4")


@dataclass(frozen=True)
class CacheSide:
    """K or V of one layer that has a cache of its own, and its mean KL, nats a token, in each codec."""

    layer: int
    side: Side
    values: int  # of a token
    nbytes: dict[Codec, int]  # of a token
    kl: dict[Codec, float]


@dataclass(frozen=True)
class Sensitivity:
    """What was measured over `windows` windows of `length` tokens."""

    sides: list[CacheSide]
    uniform: dict[str, float]  # mean KL with all layers in one format
    windows: int
    length: int

    @property
    def values(self) -> int:
        """Of a token, in all layers."""
        return sum(one.values for one in self.sides)


def readings(bound: BoundModel) -> int:
    """Of each window, that `measure` takes."""
    return 1 + len(UNIFORM) + len(_owned(bound))


def measure(
    bound: BoundModel,
    calibration: Calibration | None,
    windows: Sequence[Sequence[int]],
    go_on: Callable[[int], bool],
    progress: Callable[[], None],
) -> Sensitivity:
    """Over `windows` of one length, as many as `go_on(windows done)` wants, one at least."""
    owned, raw = _owned(bound), bound.raw_format
    found: list[list[float]] = []  # of each window

    def alone(layer: int, side: Side) -> list[KVFormat]:
        own = KVFormat(FEW, raw.v, SPAN) if side == "k" else KVFormat(raw.k, FEW, SPAN)
        return [own if i == layer else raw for i in range(len(bound.shapes))]

    formats: list[KVFormat | Iterable[KVFormat]] = [*map(KVFormat.parse, UNIFORM), *(alone(*side) for side in owned)]
    trials = [Reading(bound, own, calibration) for own in formats]
    for window in windows:
        if found and not go_on(len(found)):
            break
        found.append(list(losses(trials, window, progress)))
    means = [sum(column) / len(found) for column in zip(*found, strict=True)]
    uniform, few = dict(zip(UNIFORM, means[: len(UNIFORM)], strict=True)), means[len(UNIFORM) :]
    sides = sides_of(bound, dict(zip(owned, few, strict=True)), uniform["kv8"])
    return Sensitivity(sides, uniform, len(found), len(windows[0]))


def sides_of(bound: BoundModel, few: Mapping[tuple[int, Side], float], more: float) -> list[CacheSide]:
    """All of them, from the KL of each in 4 bits and of all together in 8."""
    raw, share, sides = bound.raw_format, more / max(sum(few.values()), 1e-30), []
    for (layer, side), loss in few.items():
        shape = bound.shapes[layer]
        dim, lost = shape.dim(side), {FEW: loss, MORE: loss * share, raw.k: 0.0}
        nbytes = {codec: shape.kv_heads * codec.row_bytes(dim) for codec in lost}
        sides.append(CacheSide(layer, side, shape.kv_heads * dim, nbytes, lost))
    return sides


def _owned(bound: BoundModel) -> list[tuple[int, Side]]:
    """K and V of every layer with a cache of its own."""
    return [(i, side) for i, shape in enumerate(bound.shapes) if shape.shares is None for side in SIDES]
