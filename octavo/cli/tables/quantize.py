"""The table of `octavo quantize`."""

from __future__ import annotations

from rich.table import Table

from octavo.cli.tables import table
from octavo.quantize import Quantized, Rounded


def error_table(quantized: Quantized) -> Table:
    """What rounding changes in the layers' outputs, by kind of layer, means over the blocks of the model."""
    columns = ("layers", "scale absorbed by", "blocks", "α", "rtn", "here")
    rows = table("Errors of the layers' outputs, relative mean squares", *columns)
    kinds: dict[str, list[Rounded]] = {}
    for group in quantized.groups:
        kinds.setdefault(group.fold.kind, []).append(group)
    for groups in kinds.values():
        fold = groups[0].fold
        alphas = [group.alpha for group in groups if group.alpha is not None]
        rows.add_row(
            " ".join(name.rpartition(".")[2] for name in fold.layers),
            fold.source.rpartition(".")[2] if alphas and fold.source else "–",
            str(len(groups)),
            f"{sum(alphas) / len(alphas):.2f}" if alphas else "–",
            f"{sum(group.plain for group in groups) / len(groups):.2e}",
            f"{sum(group.error for group in groups) / len(groups):.2e}",
        )
    return rows
