"""What `octavo tune` does: measure each part of the cache alone, choose, and measure the choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo.cache.plan import SIDES
from octavo.engine.reading import Reading
from octavo.measure.accuracy.compare import losses
from octavo.measure.tune.choice import choose, formats_of
from octavo.measure.tune.sensitivity import FEW, UNIFORM, Sensitivity
from octavo.models.bind import BoundModel
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat, LayerFormats
from octavo.quant.tuned import Header, Tuned


@dataclass(frozen=True)
class Row:
    """Formats of all layers, and what they lose: mean KL, nats a token, measured, and expected if losses add up."""

    name: str
    bits: float  # of a value, scales included
    kl: float
    expected: float


@dataclass(frozen=True)
class Tuning:
    """What was chosen, and how it compares with one format for all layers over the same windows."""

    formats: LayerFormats
    sensitivity: Sensitivity
    rows: list[Row]  # by bits, the chosen ones among them
    text: str

    @property
    def chosen(self) -> Row:
        return next(row for row in self.rows if row.name == self.formats.name)

    def artefact(self, fingerprint: str) -> Tuned:
        found, row = self.sensitivity, self.chosen
        kl = torch.full((len(self.formats), 2), torch.nan)
        for one in found.sides:
            kl[one.layer, SIDES.index(one.side)] = one.kl[FEW]
        names = [str(format) for format in self.formats]
        header = Header(fingerprint, names, row.bits, row.kl, row.expected, self.text, found.windows, found.length)
        return Tuned(header, kl)

    def document(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        found = self.sensitivity
        return {
            "text": self.text,
            "windows": found.windows,
            "window": found.length,
            "rows": [vars(row) for row in self.rows],
            "layers": [str(format) for format in self.formats],
            "kl_of_4_bits": [
                {"layer": one.layer, "side": one.side, "kl": one.kl[FEW]} for one in found.sides
            ],
        }  # fmt: skip


def tune(
    bound: BoundModel,
    calibration: Calibration | None,
    sensitivity: Sensitivity,
    budget: int,
    windows: Sequence[Sequence[int]],
    text: str,
    progress: Callable[[], None],
) -> Tuning:
    """The formats that lose least within `budget` bytes a token, measured once over `windows`, those of `sensitivity`,
    which are of `text`."""
    formats = formats_of(bound, sensitivity.sides, choose(sensitivity.sides, budget))
    found = [next(losses([Reading(bound, formats, calibration)], window, progress)) for window in windows]
    measured = sensitivity.uniform | {formats.name: sum(found) / len(found)}
    each = {name: [KVFormat.parse(name)] * len(formats) for name in UNIFORM} | {formats.name: list(formats)}
    rows = []
    for name, own in each.items():
        bits, expected = _sums(sensitivity, own)
        rows.append(Row(name, bits, measured[name], expected))
    return Tuning(formats, sensitivity, sorted(rows, key=lambda row: -row.bits), text)


def _sums(sensitivity: Sensitivity, formats: Sequence[KVFormat]) -> tuple[float, float]:
    """Bits of a value, and the expected KL, of these formats of the layers."""
    pairs = [(one, getattr(formats[one.layer], one.side)) for one in sensitivity.sides]
    size = sum(one.nbytes[own] for one, own in pairs)
    return 8 * size / sensitivity.values, sum(one.kl[own] for one, own in pairs)
