"""What `octavo tune` prints."""

from collections.abc import Sequence

from rich.table import Table

from octavo.cli.tables import console, table
from octavo.measure.tune.tuning import Tuning

GROUP = 10  # layers side by side


def show(found: Tuning) -> None:
    out, sensitivity, chosen = console(), found.sensitivity, found.chosen
    out.print(_rows(found))
    count = f"{sensitivity.windows} window{'s' * (sensitivity.windows > 1)}"
    ratio = chosen.kl / chosen.expected if chosen.expected else 1.0
    out.print(
        f"Measured on {count} of {sensitivity.length} tokens of {found.text}: KL from the "
        "unquantized cache, nats a token. `sum of parts` is what it would be if what each layer's K and V lose alone "
        f"added up; the choice loses {ratio:.2f} times that.\n",
        markup=False,
    )
    out.print("Bits of each layer, from the first:")
    for side in ("k", "v"):
        bits = [str(getattr(format, side).bits) for format in found.formats]
        out.print(f"  {side.upper()}  {_grouped(bits)}")


def _rows(found: Tuning) -> Table:
    rows = table("The tuned formats beside uniform ones", "format", "bits", "KL", "sum of parts")
    for row in found.rows:
        style = "bold" if row is found.chosen else None
        rows.add_row(row.name, f"{row.bits:.2f}", f"{row.kl:.1e}", f"{row.expected:.1e}", style=style)
    return rows


def _grouped(bits: Sequence[str]) -> str:
    return "   ".join(" ".join(bits[i : i + GROUP]) for i in range(0, len(bits), GROUP))
