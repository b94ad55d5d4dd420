"""The table of `octavo plan --fleet`, and what it assumes."""

from collections.abc import Sequence

from rich.table import Table

from octavo.cli.tables import closes, mib, table
from octavo.measure.memory.fleet import Fleet, Gpu, Wanted
from octavo.units import format_bytes


def fleet_table(found: Sequence[Fleet], wanted: Wanted) -> Table:
    title = (
        f"The fewest GPUs for {wanted.sessions:,} sessions of {wanted.context:,} tokens and "
        f"{wanted.tokens_per_second:,.0f} tokens a second (computed)"
    )
    columns = ("weights", "KV", "GPUs", "replicas", "GPUs of each", "MiB of weights a GPU", "MiB per session",
               "sessions a replica holds", "tokens/s of a session", "tokens/s at most")  # fmt: skip
    rows = table(title, *columns, keys=2)
    for i, fleet in enumerate(found):
        rows.add_row(
            fleet.weights, fleet.kv, f"{fleet.gpus:,}", f"{fleet.replicas:,}", f"{fleet.ranks}",
            mib(fleet.weight_bytes), mib(fleet.session_bytes), f"{fleet.sessions:,}", f"{1 / fleet.step:,.0f}",
            f"{fleet.most:,.0f}", end_section=closes(found, i, "weights"),
        )  # fmt: skip
    return rows


def assumptions(wanted: Wanted, gpu: Gpu) -> list[str]:
    """What the table assumes, a sentence a line."""
    return [
        "Assumed, not measured:",
        f"- A GPU has {format_bytes(gpu.memory)}, of which {gpu.kept:.0%} are held back for the runtime.",
        f"- It reads {gpu.bandwidth / 1e12:.2f} TB/s, of which a decode step reaches {gpu.streamed:.0%}, and computes "
        f"{gpu.operations / 1e12:.0f} TFLOP/s, of which products reach {gpu.computed:.0%}; one after the other.",
        "- Weights are divided evenly, and all are read and computed with in each step, experts too. Attention's own "
        "operations cost nothing.",
        f"- A step costs {1000 * gpu.overhead:.1f} ms on the host, and four times a layer {1e6 * gpu.gather:.0f} µs "
        "to gather rows where a replica has several GPUs.",
        f"- For each generated token {wanted.prompt:g} prompt tokens are computed; prefix hits cost nothing.",
        "- A session keeps its rows while it is open; sessions spread evenly over replicas (docs/SCALE.md says how far "
        "that is true).",
    ]
