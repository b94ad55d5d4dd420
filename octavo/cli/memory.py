"""`octavo memory`: where the memory goes, for each cache format and number of sessions; computed, then measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.options import ShapeOptions, option, takes
from octavo.cli.speed import numbers
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.measure.memory.costs import Cost
    from octavo.measure.memory.points import Point
    from octavo.measure.memory.process import Source
    from octavo.models.geometry import Geometry
    from octavo.quant.format import KVFormat

CONTEXT = 2048


@takes(ShapeOptions)
def memory(
    options: ShapeOptions,
    batch_size: Annotated[str, typer.Option(help="Sessions at a time.")] = "8,16,32,48",
    context: Annotated[
        int | None, typer.Option(help=f"Tokens of every session. [default: {CONTEXT}, or the model's context]")
    ] = None,
    kv: Annotated[
        str | None,
        option("Formats to compare, as in fp16,int8; the first is the baseline. [default: the model's own, int8]"),
    ] = None,
    weights: Annotated[
        str | None,
        option("Kinds of weights to compare, as in fp16,int4. [default: the model's own; of 4-bit models both]"),
    ] = None,
    baseline: Annotated[
        str | None, option("The same model with 16-bit weights, to measure beside MODEL with 4-bit ones.")
    ] = None,
    device: Annotated[str, option("auto, cpu, cuda, cuda:1, …")] = "auto",
    load_format: Annotated[str, option("auto, or dummy to measure with random weights.")] = "auto",
    fill_seconds: Annotated[
        float,
        typer.Option(help="How long the model may fill sessions in one measurement; then random rows do.", min=0),
    ] = 20.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure the memory of MODEL with all sessions filled; with --config alone, compute it."""
    from contextlib import nullcontext

    from octavo.cli.progress import progress
    from octavo.measure import machine
    from octavo.measure.document import dumps
    from octavo.measure.memory.costs import costs, device_memory, find_device, own_kind
    from octavo.measure.memory.points import points, saved
    from octavo.measure.memory.process import Source
    from octavo.models.geometry import Geometry

    batches, where = numbers(batch_size, "--batch-size"), find_device(device)
    name, path = options.locate()
    with_weights = Source(path, options.dtype, str(where), load_format, options.model_format, fill_seconds)
    geometry = Geometry.trace(path, options.dtype, options.model_format)
    length = min(CONTEXT, geometry.max_context) if context is None else context
    room = device_memory(where)
    chosen = kinds(geometry, weights)
    theory = costs(geometry, formats(geometry, kv), length, room, chosen)
    about, out = machine.describe(where), console()
    if not json:
        out.print(f"{name} on {machine.sentence(about)}", markup=False)
        out.print(cost_table(theory, length, room))
    sources = {own_kind(geometry): with_weights} if options.config is None or load_format == "dummy" else {}
    if baseline is not None:
        sources |= baseline_source(baseline, geometry, with_weights)
    with progress() if sources else nullcontext() as bar:
        task = bar.add_task("measuring", total=len(batches) * len(theory)) if bar else None
        found = points(theory, batches, length, sources, (lambda _: bar.advance(task)) if bar else None)
    if not json:
        show(found, length, where.type, out)
        return
    rows = []
    for point in found:
        cache, total = saved(point, found)
        rows.append({**point.document(), "saved_cache": cache, "saved_total": total})
    print(
        dumps(
            {
                "command": "memory",
                "model": name,
                "machine": about,
                "dtype": str(geometry.dtype)[6:],
                "context": length,
                "unit": "bytes",
                "weights": {"how": "computed", "bytes": geometry.weights},
                "memory": {"how": "measured", "bytes": room},
                "theory": [{"how": "computed", **asdict(row)} for row in theory],
                "points": rows,
            }
        )
    )


def formats(geometry: Geometry, kv: str | None, default: Sequence[str] = ("int8",)) -> list[KVFormat]:
    """Those of --kv, each once; or the model's own and those of `default`."""
    from octavo.measure.memory.costs import baseline
    from octavo.quant.format import KVFormat

    if kv is None:
        return [baseline(geometry), *(KVFormat.parse(name) for name in default)]
    return list(dict.fromkeys(KVFormat.parse(name) for name in kv.split(",")))


def kinds(geometry: Geometry, weights: str | None) -> list[str]:
    """Those of --weights, each once; or the model's own, of a 4-bit model also its 16-bit one's."""
    from octavo.measure.memory.costs import own_kind, weight_kinds

    known = weight_kinds(geometry)
    if weights is None:
        return list(known) if geometry.packed else [own_kind(geometry)]
    chosen = list(dict.fromkeys(weights.split(",")))
    for kind in chosen:
        if kind not in known:
            raise OctavoError(f"--weights {kind}: this model's are {' or '.join(known)}")
    return chosen


def baseline_source(model: str, geometry: Geometry, own: Source) -> dict[str, Source]:
    """Where the 16-bit weights are measured. Raises OctavoError if they are another model's."""
    from dataclasses import replace

    from octavo.measure.memory.costs import own_kind
    from octavo.models.geometry import Geometry
    from octavo.models.model import locate

    _, path = locate(model)
    dtype = str(geometry.dtype).removeprefix("torch.")  # checkpoints in 4 bits are fp16, their 16-bit models often bf16
    other = Geometry.trace(path, dtype)
    same = other.shapes == geometry.shapes and other.parameters == geometry.parameters
    if other.packed or not geometry.packed or not same:
        raise OctavoError(f"--baseline {model} is not the 16-bit model of a 4-bit MODEL: their layers differ")
    return {own_kind(other): replace(own, path=path, dtype=dtype, model_format="hf")}


def cost_table(theory: Sequence[Cost], context: int, room: int) -> Any:
    from octavo.cache.size import format_bytes

    title = (
        f"In theory (computed): weights of {_weights(theory)}, sessions of {context:,} tokens, "
        f"and how many fit in the {format_bytes(room)} of this device"
    )
    several = len({cost.weights for cost in theory}) > 1
    rows = (
        *(["weights"] if several else []),
        "format",
        "bytes per token",
        "MiB per session",
        "times smaller",
        "static part, MiB",
        "sessions",
    )
    found = table(title, *rows)
    for cost in theory:
        ratio = f"{theory[0].session / cost.session:.2f}"
        kind = [cost.weights] if several else []
        cells = f"{cost.token:,}", mib(cost.session), ratio, mib(cost.static), f"{cost.sessions:,}"
        found.add_row(*kind, cost.format, *cells)
    return found


def _weights(theory: Sequence[Cost]) -> str:
    sizes = {cost.weights: mib(cost.weight_bytes) for cost in theory}
    return " or ".join(f"{size} MiB ({kind})" for kind, size in sizes.items())


def show(found: Sequence[Point], context: int, device: str, out: Console) -> None:
    """The table of all points, and under it how they came about."""
    out.print(point_table(found, context, any(point.found for point in found)))
    for note in notes(found, context, device):
        out.print(note)


def point_table(found: Sequence[Point], context: int, measured: bool) -> Any:
    from octavo.measure.memory.points import saved

    columns = ["batch", "format", "weights", "KV cache", "total", "saved", ""]
    if measured:
        columns[4:6] = ["the rest", "total", "saved", "of it cache"]
    several = len({point.kind for point in found}) > 1
    if several:
        columns.insert(1, "kind")
    rows = table(f"Memory in MiB, every session with {context:,} tokens", *columns)
    baseline = found[0].kind, found[0].format
    for i, point in enumerate(found):
        of_cache, in_total = saved(point, found)
        savings = [in_total, of_cache] if measured else [of_cache]
        rest = [mib(point.rest)] if measured else []
        cells = [mib(point.weights), mib(point.cache), *rest, mib(point.total)]
        cells += ["" if (point.kind, point.format) == baseline else mib(value) for value in savings]
        ends = i + 1 == len(found) or found[i + 1].batch != point.batch
        kind = [point.kind] if several else []
        rows.add_row(f"{point.batch}", *kind, point.format, *cells, point.how, end_section=ends)
    return rows


def notes(found: Sequence[Point], context: int, device: str) -> list[str]:
    """What the table's words mean, and why some points were not measured."""
    lines = []
    filled = [(point, point.found) for point in found if point.found is not None]
    if filled:
        tokens = sum(point.batch * context for point, _ in filled)
        by_model = sum(one.by_model for _, one in filled) / tokens
        how = (
            "the model"
            if by_model == 1
            else f"the model ({by_model:.0%}), then random rows in every slot that was left"
        )
        peak = "resident set of a process of its own" if device == "cpu" else "PyTorch's allocator"
        lines.append(f"measured: weights and cache are the tensors' sizes, the total is the peak of the {peak}.")
        lines.append(f"All sessions were filled by {how}; then one decode step of all.")
        if device == "cpu":
            own = sum(one.before for _, one in filled) // len(filled)
            lines.append(f"Of the rest, {mib(own)} MiB are Python and its libraries before the model is loaded.")
        else:
            used = ", ".join(f"{point.batch} × {point.format} {mib(one.driver)}" for point, one in filled)
            lines.append(f"In use by the driver's count, MiB: {used}.")
    if len(filled) < len(found):
        lines.append("computed: weights and KV cache alone; activations, allocator and runtime come on top.")
    for reason in dict.fromkeys(point.reason for point in found if point.reason):
        points = [f"{point.batch} × {point.format}" for point in found if point.reason == reason]
        which = "nothing was" if len(points) == len(found) else f"{', '.join(points)}: not"
        lines.append(f"{which} measured: {reason}.")
    return lines


def mib(n: int | None) -> str:
    """Bytes as MiB, with a decimal where they are few; a dash where there is no number."""
    if n is None:
        return "–"
    size = n / 2**20
    if n % 2**20 == 0 or abs(size) >= 1000:
        return f"{size:,.0f}"
    return f"{size:,.1f}" if abs(size) >= 0.1 else f"{size:.2g}"


def table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    found = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    for column in columns:
        found.add_column(column, justify="left" if column in ("format", "weights", "kind", "KV", "") else "right")
    return found


def console() -> Console:
    """On stdout; where that is no terminal, wide enough for the tables."""
    import sys

    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 110)
