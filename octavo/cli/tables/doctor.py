"""What `octavo doctor` prints."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from octavo.cli.tables import plus_minus, table
from octavo.measure.doctor.diagnosis import GOOD, USABLE, Diagnosis

MARKS = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "warning": "[bold red]✗[/]"}
COLOURS = {"good": "green", "usable": "yellow", "poor": "red"}


def show(found: Diagnosis) -> None:
    console = Console(highlight=False)
    console.print(Text(found.model, style="bold"), *_anatomy(found), sep="\n")
    console.print()
    words = Table.grid(padding=(0, 2, 0, 0))
    for finding in found.findings:
        words.add_row(MARKS[finding.level], finding.topic, Text(finding.text))
    console.print(words)
    if found.accepted:
        console.print()
        console.print(_formats(found))
        if found.layers:
            console.print(_layers(found))
        console.print(
            f"Measured on {found.text}: calibrated on {found.calibrated}, then {found.measured} of the rest, in "
            f"{found.seconds:.0f} s. KL is the divergence from the 16-bit cache, nats per token; with the last bit of "
            f"16 bits flipped it is {found.rounding:.1e}. With two standard errors, good is up to {GOOD:g} and usable "
            f"up to {USABLE:g}. Bytes are those of a token's codes over 16 bits; "
            "kv8, k8v4 and kv4 also keep 128 rows a session in 16 bits."
        )
    verdict = "[bold green]healthy[/]" if found.healthy else "[bold red]read the lines marked ✗[/]"
    console.print(f"\n{verdict if found.accepted else '[bold red]refused[/]'}")


def _anatomy(found: Diagnosis) -> list[str]:
    """The model in a few lines: what it is, and what its cache takes in theory."""
    if (anatomy := found.anatomy) is None:
        return []
    lines = [f"{anatomy.architecture}, {_millions(anatomy.parameters)} parameters in {found.weights}"]
    if found.processor is not None:
        lines.append(f"CPU: {found.processor}")
    for group in anatomy.groups:
        dims = f"{group.k_dim}" if group.k_dim == group.v_dim else f"{group.k_dim} (K) and {group.v_dim} (V)"
        extras = [
            f"window {group.window}" if group.window else "",
            f"soft cap {group.softcap:g}" if group.softcap else "",
            "sinks" if group.sinks else "",
            "reads an earlier layer's cache" if group.shared else "",
        ]
        more = "".join(f", {extra}" for extra in extras if extra)
        count = f"{len(group.layers)} layer{'s' if len(group.layers) > 1 else ''}"
        lines.append(f"{count}: {group.heads} query heads on {group.kv_heads} KV heads of {dims}{more}")
    context = f"context {anatomy.context:,}" if anatomy.context else "no limit of context"
    placed = {True: "relative positions", False: "absolute positions", None: "positions not tried"}
    lines.append(f"{context} · RoPE: {anatomy.rope} · {placed[anatomy.shift_invariant]}")
    lines.append(f"cache: {anatomy.token_bytes_16:,} bytes a token in 16 bits (computed)")
    return lines


def _formats(found: Diagnosis) -> Table:
    rows = table("Formats, against the 16-bit cache", "format", "bytes", "KL ± error", "same top token", "is")
    for score in found.formats:
        grade = found.grade(score)
        size = f"{found.sizes[score.name]:.2f}"
        cells = size, plus_minus(score.kl, score.kl_error, ".1e", ".0e"), f"{score.agreement:.1%}"
        rows.add_row(score.name, *cells, f"[{COLOURS[grade]}]{grade}[/]")
    return rows


def _layers(found: Diagnosis) -> Table:
    title = (
        "Layer by layer: the largest constant in K, the norm of its bias, the widest channel over the median one in K "
    )
    title += "and V, and the KL with this layer alone in each of " + ", ".join(found.layers)
    rows = table(title, "layer", "constant", "bias", "K", "V", *found.layers)
    widths = {(width.layer, width.side): width.ratio for width in found.widths}
    for i, own in enumerate(found.keys):
        bias = "" if own.bias_norm is None else f"{own.bias_norm:.1f}"
        kl = [f"{values[i]:.0e}" for values in found.layers.values()]
        ratios = [f"{widths[own.layer, side]:.1f}" for side in "KV"]
        style = "bold red" if own.biased else None
        rows.add_row(str(own.layer), f"{own.offset:.0f}", bias, *ratios, *kl, style=style)
    return rows


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
