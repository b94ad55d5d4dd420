"""The table of `octavo calibrate`."""

from rich.table import Table

from octavo.cache.plan import SIDES
from octavo.cli.tables import table
from octavo.quant.calibration import Calibration
from octavo.scales.ranges import Layers


def range_table(calibration: Calibration) -> Table:
    """What was seen, layer by layer: the range of all values, and the width of the widest and the median channel."""
    rows = table("Ranges of K and V seen", "layer", *_columns("min", "max", "widest", "median"))
    for i, sides in enumerate(calibration.layers):
        cells = []
        for side in ("k", "v"):
            low, high = sides[side]["min"], sides[side]["max"]
            width = (high - low).flatten()
            cells += [low.min(), high.max(), width.max(), width.median()]
        rows.add_row(str(i), *(f"{value.item():.2f}" for value in cells))
    return rows


def found_table(layers: Layers) -> Table:
    """What another project's scales say."""
    rows = table("Scales", "layer", *_columns("per", "from", "to", "scale"))
    for i, sides in sorted(layers.items()):
        cells = []
        for found in (sides[side] for side in SIDES):
            scale = f"{found.scale.min().item():.4g}" if found.scale is not None else ""
            if found.scale is not None and found.scale.numel() > 1:
                scale += f" … {found.scale.max().item():.4g}"
            cells += [found.granularity, f"{found.low.min().item():.2f}", f"{found.high.max().item():.2f}", scale]
        rows.add_row(str(i), *cells)
    return rows


def _columns(*names: str) -> list[str]:
    return [f"{side} {name}" for side in "KV" for name in names]
