"""`octavo doctor`: will this model work, and will its cache quantize well?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.options import LoadOptions, takes
from octavo.errors import Unsupported

if TYPE_CHECKING:
    from octavo.measure.doctor.diagnosis import Diagnosis

MARKS = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "warning": "[bold red]✗[/]"}
COLOURS = {"good": "green", "usable": "yellow", "poor": "red"}


@takes(LoadOptions)
def doctor(
    options: LoadOptions,
    text: Annotated[
        str | None,
        typer.Option(
            help="What formats are measured on: a .txt or .jsonl file, a named set, or self: text the model writes. "
            "[default: a bundled English text]",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Examine MODEL: does it work, and which cache formats suit it? Status 0: it is healthy; 1: it is refused, or
    something is advised against."""
    from octavo.cli.progress import progress
    from octavo.measure.doctor.diagnose import diagnose
    from octavo.measure.doctor.diagnosis import Diagnosis
    from octavo.measure.document import dumps
    from octavo.measure.machine import describe

    try:
        model = options.load()
    except Unsupported as refusal:
        found, machine = Diagnosis.refused(options.model or "pamphlet", str(refusal)), None
    else:
        with progress() as bar:
            task = bar.add_task("examining", total=100)
            found = diagnose(model, text, lambda share: bar.update(task, completed=round(100 * share)))
        machine = describe(model.bound.device)
    if json:
        print(dumps({"command": "doctor", "machine": machine, **found.document()}))
    else:
        _show(found)
    if not found.healthy:
        raise typer.Exit(1)


def _show(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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
        console.print(_layers(found))
        console.print(
            f"Measured on {found.text}: calibrated on {found.calibrated}, then {found.measured} of the rest, in "
            f"{found.seconds:.0f} s. KL is the divergence from the 16-bit cache, nats per token; with the last bit of "
            f"16 bits flipped it is {found.rounding:.1e}."
        )
    verdict = "[bold green]healthy[/]" if found.healthy else "[bold red]read the lines marked ✗[/]"
    console.print(f"\n{verdict if found.accepted else '[bold red]refused[/]'}")


def _anatomy(found: Diagnosis) -> list[str]:
    """The model in a few lines: what it is, and what its cache takes in theory."""
    if (anatomy := found.anatomy) is None:
        return []
    lines = [f"{anatomy.architecture}, {_millions(anatomy.parameters)} parameters in {found.weights}"]
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
    half = anatomy.token_bytes_16 // 2
    lines.append(f"cache: {anatomy.token_bytes_16:,} bytes a token in 16 bits, {half:,} in int8 (computed)")
    return lines


def _formats(found: Diagnosis) -> Any:
    table = _table("Formats, against the 16-bit cache", "format", "KL", "99 %", "same top token", "")
    for score in found.formats:
        grade = found.grade(score)
        cells = f"{score.kl:.1e} ± {score.kl_error:.0e}", f"{score.kl_p99:.1e}", f"{score.agreement:.1%}"
        table.add_row(score.name, *cells, f"[{COLOURS[grade]}]{grade}[/]")
    return table


def _layers(found: Diagnosis) -> Any:
    title = (
        "Layer by layer: the largest constant in K, the norm of its bias, the widest channel over the median one in K "
    )
    title += "and V, and the KL with this layer alone in each of " + ", ".join(found.layers)
    table = _table(title, "layer", "constant", "bias", "K", "V", *found.layers)
    widths = {(width.layer, width.side): width.ratio for width in found.widths}
    for i, own in enumerate(found.keys):
        bias = "" if own.bias_norm is None else f"{own.bias_norm:.1f}"
        kl = [f"{values[i]:.0e}" for values in found.layers.values()]
        ratios = [f"{widths[own.layer, side]:.1f}" for side in "KV"]
        style = "bold red" if own.biased else None
        table.add_row(str(own.layer), f"{own.offset:.0f}", bias, *ratios, *kl, style=style)
    return table


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("format", "") else "right", no_wrap=True)
    return table


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
