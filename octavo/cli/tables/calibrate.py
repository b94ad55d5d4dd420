"""The table of `octavo calibrate`."""

from __future__ import annotations

from rich.table import Table

from octavo.quant.calibration import Calibration


def range_table(calibration: Calibration) -> Table:
    """What was seen, layer by layer: the range of all values, and the width of the widest and the median channel."""
    table = Table(title="Ranges of K and V seen")
    table.add_column("layer", justify="right")
    for side in ("K", "V"):
        for name in ("min", "max", "widest", "median"):
            table.add_column(f"{side} {name}", justify="right")
    for i, sides in enumerate(calibration.layers):
        cells = []
        for side in ("k", "v"):
            low, high = sides[side]["min"], sides[side]["max"]
            width = (high - low).flatten()
            cells += [low.min(), high.max(), width.max(), width.median()]
        table.add_row(str(i), *(f"{value.item():.2f}" for value in cells))
    return table
