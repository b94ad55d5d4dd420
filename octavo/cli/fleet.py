"""`octavo plan --fleet`: how many replicas and GPUs serve so many sessions."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from octavo.cli.loading import ShapeOptions
from octavo.cli.memory import CONTEXT
from octavo.errors import OctavoError


@dataclass(frozen=True)
class Asked:
    """What the command line says of a fleet; None leaves it to what is assumed."""

    sessions: int | None
    tokens_per_second: float | None
    bandwidth: float | None  # TB/s
    prompt: float | None

    def refuse(self) -> None:
        """Raise OctavoError for options that change nothing without --fleet."""
        if given := [name for name, value in vars(self).items() if value is not None]:
            raise OctavoError(f"--{given[0].replace('_', '-')} says what a fleet is to serve: give --fleet too")


def plan_fleet(
    options: ShapeOptions,
    asked: Asked,
    memory: str | None,
    reserve: str,
    context: int | None,
    kv: str | None,
    json: bool,
) -> None:
    """Print the table, or the JSON document."""
    from octavo.cli.candidates import formats
    from octavo.cli.tables import console
    from octavo.cli.tables.fleet import assumptions, fleet_table
    from octavo.measure.as_json import dumps
    from octavo.measure.memory.fleet import Gpu, Wanted, fleets
    from octavo.models.geometry import Geometry
    from octavo.quant.format import ADVISED
    from octavo.units import parse_bytes

    if asked.sessions is None:
        raise OctavoError("--fleet needs --sessions: how many are open at a time")
    gpu = Gpu()
    whole = parse_bytes(memory) if memory is not None else gpu.memory
    kept = parse_bytes(reserve) / whole if parse_bytes(reserve) else gpu.kept
    if kept >= 1:
        raise OctavoError(f"--reserve {reserve} leaves nothing of a GPU's memory")
    gpu = Gpu(whole, kept, gpu.bandwidth if asked.bandwidth is None else 1e12 * asked.bandwidth)
    name, path = options.locate()
    geometry = Geometry.trace(path, options.dtype, options.model_format)
    wanted = Wanted(
        asked.sessions,
        min(CONTEXT, geometry.max_context) if context is None else context,
        float(asked.sessions) if asked.tokens_per_second is None else asked.tokens_per_second,
        Wanted.prompt if asked.prompt is None else asked.prompt,
    )
    found = fleets(geometry, formats(geometry, kv, (name, path), ADVISED), wanted, gpu)
    if json:
        rows = [asdict(fleet) | {"gpus": fleet.gpus} for fleet in found]
        document = {"command": "plan", "how": "computed", "model": name, "unit": "bytes", "wanted": asdict(wanted)}
        print(dumps(document | {"assumed": asdict(gpu), "fleets": rows}))
        return
    out = console()
    out.print(fleet_table(found, wanted))
    for line in assumptions(wanted, gpu):
        out.print(line, markup=False)
