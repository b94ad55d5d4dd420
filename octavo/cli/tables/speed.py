"""The tables of `octavo speed`."""

from collections.abc import Sequence

from rich.table import Table

from octavo.cli.tables import table
from octavo.measure.speed.roofline import Ceiling
from octavo.measure.speed.throughput import Speed
from octavo.units import format_bytes


def ceiling_table(theory: Sequence[Ceiling]) -> Table:
    columns = ("batch", "context", "format", "weights", "cache", "tokens/s at most")
    rows = table("What a decode step reads, and the ceiling this sets (computed)", *columns, keys=3)
    for row in theory:
        read = format_bytes(row.weight_bytes), format_bytes(row.cache_bytes)
        rows.add_row(f"{row.batch_size}", f"{row.context:,}", row.kv, *read, f"{row.decode:,.0f}")
    return rows


def speed_table(found: Sequence[Speed]) -> Table:
    columns = (
        "batch", "context", "format", "prefill\ntokens/s", "ratio", "decode\ntokens/s", "ratio (range)", "of\nceiling",
        "first token, ms\np50 / p99", "per token, ms\np50 / p99",
    )  # fmt: skip
    rows = table("Measured", *columns, keys=3)
    for row in found:
        ratio = row.decode_ratio
        spread = f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
        rows.add_row(
            f"{row.batch_size}",
            f"{row.context:,}",
            row.kv,
            f"{row.prefill:,.0f}",
            f"{row.prefill_ratio.median:.2f}",
            f"{row.decode:,.0f}",
            spread,
            f"{row.ceiling:.0%}",
            *(f"{1e3 * times.p50:,.1f} / {1e3 * times.p99:,.1f}" for times in (row.first_token, row.per_token)),
        )
    return rows
