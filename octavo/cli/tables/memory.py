"""The tables of `octavo memory` and `octavo plan`."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from octavo.cli.tables import closes, mib, table
from octavo.measure.memory.costs import Cost
from octavo.measure.memory.points import Point, saved
from octavo.units import format_bytes


def cost_table(theory: Sequence[Cost], context: int, room: int) -> Table:
    title = (
        f"In theory (computed): weights of {_weights(theory)}, sessions of {context:,} tokens, "
        f"and how many fit in the {format_bytes(room)} of this device"
    )
    if states := theory[0].states:
        title += f"; {mib(states)} MiB of a session are states of fixed size and their snapshots, in any format"
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
    found = table(title, *rows, keys=2 if several else 1)
    for cost in theory:
        ratio = f"{theory[0].session / cost.session:.2f}"
        kind = [cost.weights] if several else []
        cells = f"{cost.token:,}", mib(cost.session), ratio, mib(cost.static), f"{cost.sessions:,}"
        found.add_row(*kind, cost.format, *cells)
    return found


def _weights(theory: Sequence[Cost]) -> str:
    sizes = {cost.weights: mib(cost.weight_bytes) for cost in theory}
    return " or ".join(f"{size} MiB ({kind})" for kind, size in sizes.items())


def show(found: Sequence[Point], context: int, peak: str, out: Console) -> None:
    """The table of all points, and under it how they came about."""
    out.print(point_table(found, context, any(point.found for point in found)))
    for note in notes(found, context, peak):
        out.print(note)


def point_table(found: Sequence[Point], context: int, measured: bool) -> Table:
    columns = ["batch", "format", "weights", "KV cache", "total", "saved", ""]
    if measured:
        columns[4:6] = ["the rest", "total", "saved", "of it cache"]
    several = len({point.kind for point in found}) > 1
    if several:
        columns.insert(1, "kind")
    rows = table(f"Memory in MiB, every session with {context:,} tokens", *columns, keys=3 if several else 2)
    baseline = found[0].kind, found[0].format
    for i, point in enumerate(found):
        of_cache, in_total = saved(point, found)
        savings = [in_total, of_cache] if measured else [of_cache]
        rest = [mib(point.rest)] if measured else []
        cells = [mib(point.weights), mib(point.cache), *rest, mib(point.total)]
        cells += ["" if (point.kind, point.format) == baseline else mib(value) for value in savings]
        kind = [point.kind] if several else []
        rows.add_row(f"{point.batch}", *kind, point.format, *cells, point.how, end_section=closes(found, i, "batch"))
    return rows


def notes(found: Sequence[Point], context: int, peak: str) -> list[str]:
    """What the table's words mean, and why some points were not measured. `peak` is what the peak was read from."""
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
        lines.append(f"measured: weights and cache are the tensors' sizes, the total is the peak of the {peak}.")
        lines.append(f"All sessions were filled by {how}; then one decode step of all.")
        if filled[0][1].driver is None:
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


def fit_table(found: Sequence[Cost], context: int, room: str) -> Table:
    columns = ("weights", "KV", "MiB of weights", "MiB per session", "sessions", "times as many")
    states = (
        f"; {mib(found[0].states)} MiB of each are states of fixed size and their snapshots" if found[0].states else ""
    )
    rows = table(f"Sessions of {context:,} tokens that fit in {room} (computed){states}", *columns, keys=2)
    first = found[0].sessions
    for i, fit in enumerate(found):
        ratio = f"{fit.sessions / first:.2f}" if first else "–"
        sizes = mib(fit.weight_bytes), mib(fit.session)
        rows.add_row(
            fit.weights, fit.format, *sizes, f"{fit.sessions:,}", ratio, end_section=closes(found, i, "weights")
        )
    return rows
