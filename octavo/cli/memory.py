"""`octavo memory`: where the memory goes, for each cache format and number of sessions; computed, then measured."""

from typing import Annotated

from octavo.cli.candidates import formats_option
from octavo.cli.loading import ShapeOptions
from octavo.cli.options import DeviceName, Json, LoadFormat, numbers, of_model, option, takes
from octavo.quant.format import dtype_name


@takes(ShapeOptions)
def memory(
    options: ShapeOptions,
    batch_size: Annotated[str, option("Sessions at a time: one number, or several with commas.")] = "8,16,32,48",
    kv: Annotated[
        str | None,
        formats_option(
            "Formats to compare, as in fp16,int8; the first is the baseline. [default: the model's own, int8]"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        of_model("Kinds of weights to compare, as in fp16,int4. [default: the model's own; of 4-bit models both]"),
    ] = None,
    baseline: Annotated[
        str | None, of_model("The same model with 16-bit weights, to measure beside MODEL with 4-bit ones.")
    ] = None,
    device: DeviceName = "auto",
    load_format: LoadFormat = "auto",
    fill_seconds: Annotated[
        float, option("How long the model may fill sessions in one measurement; then random rows do.", min=0)
    ] = 20.0,
    json: Json = False,
) -> None:
    """Measure the memory of MODEL with all sessions filled; with --config alone, compute it."""
    batches = numbers(batch_size, "--batch-size")
    options.tell()
    from contextlib import nullcontext

    from octavo import processor
    from octavo.cli.candidates import baseline_source, formats, kinds
    from octavo.cli.progress import progress
    from octavo.cli.tables import console
    from octavo.cli.tables.memory import cost_table, show
    from octavo.devices import HOST, device_of, find_device
    from octavo.measure import machine
    from octavo.measure.as_json import dumps
    from octavo.measure.memory.costs import costs, own_kind
    from octavo.measure.memory.points import points, saved
    from octavo.measure.memory.process import Source
    from octavo.progress import silent

    where = find_device(device)
    name, path = options.locate()
    with_weights = Source(path, options.dtype, str(where), load_format, options.model_format, fill_seconds)
    geometry, length = options.trace(path)
    room = device_of(where).memory()
    chosen = kinds(geometry, weights)
    theory = costs(geometry, formats(geometry, kv, (name, path)), length, room, chosen)
    about, out = machine.describe(where), console()
    if not json:
        out.print(f"{name} on {machine.sentence(about)}", markup=False)
        if where == HOST:
            out.print(f"CPU: {processor.name()}, {processor.instructions()}", markup=False)
        out.print(cost_table(theory, length, room))
    sources = {own_kind(geometry): with_weights} if options.config is None or load_format == "dummy" else {}
    if baseline is not None:
        sources |= baseline_source(baseline, geometry, with_weights)
    with progress() if sources else nullcontext() as bar:
        task = bar.add_task("measuring", total=len(batches) * len(theory)) if bar else None
        found = points(theory, batches, length, sources, (lambda _: bar.advance(task)) if bar else silent)
    if not json:
        show(found, length, device_of(where).measures, out)
        return
    rows = []
    for point in found:
        cache, total = saved(point, found)
        rows.append({**point.document(), "saved_cache": cache, "saved_total": total})
    document = {
        "command": "memory",
        "model": name,
        "machine": about,
        "dtype": dtype_name(geometry.dtype),
        "context": length,
        "unit": "bytes",
        "weights": {"how": "computed", "bytes": geometry.weights},
        "memory": {"how": "measured", "bytes": room},
        "theory": [{"how": "computed", **row.document()} for row in theory],
        "points": rows,
    }
    print(dumps(document))
