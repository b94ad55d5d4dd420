"""What `octavo quantize` prints."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from octavo.cli.tables import table
from octavo.models.files import weight_files
from octavo.quantize import Quantized, Rounded
from octavo.units import format_bytes


def show(quantized: Quantized, read: str, kept: Sequence[str], before: Path, after: Path) -> None:
    """`read` is what the errors are measured on, `kept` are the layers that stay in 16 bits."""
    console = Console()
    console.print(error_table(quantized))
    console.print(read)
    listed = ", ".join(kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
    console.print(f"in 16 bits: {f'{listed}; ' if kept else ''}embeddings and norms")
    old, new = (sum(file.stat().st_size for file in weight_files(path)) for path in (before, after))
    console.print(
        f"{quantized.bits_per_weight:.2f} bits a weight in {quantized.weights:,} weights of linear layers, scales and "
        f"zeros included; files {format_bytes(old)} → {format_bytes(new)}"
    )
    console.print(f"saved to {after}; serve it with --model-format awq", soft_wrap=True)


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
