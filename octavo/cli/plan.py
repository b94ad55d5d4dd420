"""`octavo plan`: how many sessions fit in so much memory, by weights and cache format; and the growth as a picture.

With --fleet the question is turned round: how many GPUs so many sessions need (fleet.py).
"""

from pathlib import Path
from typing import Annotated

from octavo.cli.candidates import formats_option
from octavo.cli.fleet import FleetOptions, plan_fleet
from octavo.cli.loading import ShapeOptions
from octavo.cli.options import Json, amount, option, takes
from octavo.errors import OctavoError


@takes(ShapeOptions, FleetOptions)
def plan(
    options: ShapeOptions,
    asked: FleetOptions,
    memory: Annotated[
        str | None,
        option("Memory of the device, like 80GiB. [default: this one's; 80 GB with --fleet]", callback=amount),
    ] = None,
    kv: Annotated[
        str | None,
        formats_option("Formats to compare, the baseline first. [default: the model's own, kv8, k8v4, kv4, int8]"),
    ] = None,
    reserve: Annotated[
        str,
        option(
            "Memory held back for activations and the runtime, like 2GiB. [default: none; 10 % with --fleet]",
            callback=amount,
        ),
    ] = "0",
    plot: Annotated[
        Path | None, option("Draw memory over sessions, of the first two formats, to a .png, .svg or .pdf file.")
    ] = None,
    json: Json = False,
) -> None:
    """Compute how many sessions of MODEL fit, or how many GPUs they need. Nothing is run, and a config is enough."""
    options.tell()
    if plot is not None:
        from octavo.measure.report.picture import check_picture

        check_picture(plot)
    from octavo.cli.candidates import formats
    from octavo.cli.tables import console
    from octavo.cli.tables.memory import fit_table
    from octavo.devices import device_of, find_device
    from octavo.measure.as_json import dumps
    from octavo.measure.memory.costs import costs, int4_bits, weight_kinds
    from octavo.measure.report.picture import draw_growth
    from octavo.quant.format import ADVISED
    from octavo.units import format_bytes, parse_bytes

    if asked.fleet:
        if plot is not None:
            raise OctavoError("--fleet draws nothing: leave --plot out")
        plan_fleet(options, asked, memory, reserve, kv, json)
        return
    whole = parse_bytes(memory) if memory is not None else device_of(find_device("auto")).memory()
    room = whole - parse_bytes(reserve)
    if room <= 0:
        raise OctavoError(f"--reserve {reserve} leaves nothing of {format_bytes(whole)}")
    name, path = options.locate()
    geometry, length = options.trace(path)
    chosen = formats(geometry, kv, (name, path), ADVISED)
    found = costs(geometry, chosen, length, room, list(weight_kinds(geometry)))
    if plot is not None:
        drawn = {str(format) for format in chosen[:2]}
        draw_growth([cost for cost in found if cost.format in drawn], room, length, name, plot)
    if json:
        document = {
            "command": "plan",
            "how": "computed",
            "model": name,
            "memory": whole,
            "reserve": whole - room,
            "context": length,
            "unit": "bytes",
            "int4_bits_per_weight": int4_bits(geometry.group),
            "fits": [cost.fit() for cost in found],
            "plot": str(plot) if plot is not None else None,
        }
        print(dumps(document))
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
