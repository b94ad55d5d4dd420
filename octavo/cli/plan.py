"""`octavo plan`: how many sessions fit in so much memory, by weights and cache format; and the growth as a picture.

With --fleet the question is turned round: how many GPUs so many sessions need (fleet.py).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.candidates import formats_option
from octavo.cli.fleet import Asked, plan_fleet
from octavo.cli.loading import ShapeOptions
from octavo.cli.memory import CONTEXT
from octavo.cli.options import Json, amount, takes
from octavo.errors import OctavoError

of_fleet = partial(typer.Option, rich_help_panel="A fleet")


@takes(ShapeOptions)
def plan(
    options: ShapeOptions,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of the device, like 80GiB. [default: this one's; 80 GB with --fleet]", callback=amount
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help=f"Tokens of every session. [default: {CONTEXT}, or the model's context]")
    ] = None,
    kv: Annotated[
        str | None,
        formats_option("Formats to compare, the baseline first. [default: the model's own, kv8, k8v4, kv4, int8]"),
    ] = None,
    reserve: Annotated[
        str,
        typer.Option(
            help="Held back for activations and the runtime, like 2GiB. [default: 10 % with --fleet]", callback=amount
        ),
    ] = "0",
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw memory over sessions, of the first two formats, to a .png, .svg or .pdf file."),
    ] = None,
    json: Json = False,
    fleet: Annotated[bool, of_fleet("--fleet", help="Compute how many replicas and GPUs serve --sessions.")] = False,
    sessions: Annotated[int | None, of_fleet(help="Open at a time.", min=1, max=10**9)] = None,
    tokens_per_second: Annotated[
        float | None, of_fleet(help="Generated, of all sessions together. [default: 1 for each]", min=0)
    ] = None,
    bandwidth: Annotated[float | None, of_fleet(help="TB/s of a GPU's memory. [default: 3.35]", min=1e-3)] = None,
    prompt: Annotated[
        float | None, of_fleet(help="Prompt tokens computed for each generated one. [default: 1]", min=0)
    ] = None,
) -> None:
    """Compute how many sessions of MODEL fit, or how many GPUs they need. Nothing is run, and a config is enough."""
    options.tell()
    from octavo.cli.candidates import formats
    from octavo.cli.tables import console
    from octavo.cli.tables.memory import fit_table
    from octavo.devices import device_of, find_device
    from octavo.measure.as_json import dumps
    from octavo.measure.memory.costs import int4_bits
    from octavo.measure.memory.plan import fits
    from octavo.measure.report.picture import check_picture, draw_growth
    from octavo.models.geometry import Geometry
    from octavo.quant.format import ADVISED
    from octavo.units import format_bytes, parse_bytes

    asked = Asked(sessions, tokens_per_second, bandwidth, prompt)
    if fleet:
        if plot is not None:
            raise OctavoError("--fleet draws nothing: leave --plot out")
        plan_fleet(options, asked, memory, reserve, context, kv, json)
        return
    asked.refuse()
    if plot is not None:
        check_picture(plot)
    whole = parse_bytes(memory) if memory is not None else device_of(find_device("auto")).memory()
    room = whole - parse_bytes(reserve)
    if room <= 0:
        raise OctavoError(f"--reserve {reserve} leaves nothing of {format_bytes(whole)}")
    name, path = options.locate()
    geometry = Geometry.trace(path, options.dtype, options.model_format)
    length = min(CONTEXT, geometry.max_context) if context is None else context
    chosen = formats(geometry, kv, (name, path), ADVISED)
    found = fits(geometry, chosen, length, room)
    if plot is not None:
        drawn = {str(format) for format in chosen[:2]}
        draw_growth([fit for fit in found if fit.kv in drawn], room, length, name, plot)
    if json:
        print(
            dumps(
                {
                    "command": "plan",
                    "how": "computed",
                    "model": name,
                    "memory": whole,
                    "reserve": whole - room,
                    "context": length,
                    "unit": "bytes",
                    "int4_bits_per_weight": int4_bits(geometry.group),
                    "fits": [asdict(fit) for fit in found],
                    "plot": str(plot) if plot is not None else None,
                }
            )
        )
        return
    out = console()
    out.print(f"{name}, {format_bytes(whole)}, {format_bytes(whole - room)} of it held back", markup=False)
    out.print(fit_table(found, length, format_bytes(room)))
    if geometry.linear and not geometry.packed:
        bits, group = int4_bits(geometry.group), geometry.group
        out.print(f"int4 weights: linear layers in {bits:.2f} bits a weight, groups of {group} with scale and zero.")
    out.print(
        "Weights and KV cache alone: activations and the runtime come on top; --reserve holds memory back for them."
    )
    if plot is not None:
        out.print(f"drawn to {plot}", soft_wrap=True, markup=False)
