"""`octavo plan --fleet`: how many replicas and GPUs serve so many sessions."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

from octavo.cli.loading import ShapeOptions
from octavo.cli.options import option
from octavo.errors import OctavoError

of_fleet = partial(option, panel="A fleet")


@dataclass
class FleetOptions:
    """What the command line says of a fleet; None leaves it to what is assumed."""

    fleet: Annotated[bool, of_fleet("Compute how many replicas and GPUs serve --sessions.", "--fleet")] = False
    sessions: Annotated[int | None, of_fleet("Sessions open at a time.", min=1, max=10**9)] = None
    tokens_per_second: Annotated[
        float | None,
        of_fleet("Tokens generated a second by all sessions together. [default: 1 for each session]", min=0),
    ] = None
    bandwidth: Annotated[float | None, of_fleet("TB/s of a GPU's memory. [default: 3.35]", min=1e-3)] = None
    prompt: Annotated[float | None, of_fleet("Prompt tokens computed for each generated one. [default: 1]", min=0)] = (
        None
    )

    def check(self) -> None:
        """Raise OctavoError for options that change nothing without --fleet, and for a fleet that serves nothing."""
        if self.fleet and self.sessions is None:
            raise OctavoError("--fleet needs --sessions: how many are open at a time")
        given = [name for name, value in vars(self).items() if value is not None and name != "fleet"]
        if given and not self.fleet:
            raise OctavoError(f"--{given[0].replace('_', '-')} says what a fleet is to serve: give --fleet too")


def plan_fleet(
    options: ShapeOptions, asked: FleetOptions, memory: str | None, reserve: str, kv: str | None, json: bool
) -> None:
    """Print the table, or the JSON document."""
    from octavo.cli.candidates import formats
    from octavo.cli.tables import console
    from octavo.cli.tables.fleet import assumptions, fleet_table
    from octavo.measure.as_json import dumps
    from octavo.measure.memory.fleet import Gpu, Wanted, fleets
    from octavo.quant.format import ADVISED
    from octavo.units import parse_bytes

    assert asked.sessions is not None, "checked"
    gpu = Gpu().having(parse_bytes(memory or "0"), parse_bytes(reserve), asked.bandwidth)
    name, path = options.locate()
    geometry, length = options.trace(path)
    wanted = Wanted.of(asked.sessions, length, asked.tokens_per_second, asked.prompt)
    found = fleets(geometry, formats(geometry, kv, (name, path), ADVISED), wanted, gpu)
    if json:
        document = {"command": "plan", "how": "computed", "model": name, "unit": "bytes", "wanted": asdict(wanted)}
        print(dumps(document | {"assumed": asdict(gpu), "fleets": [fleet.document() for fleet in found]}))
        return
    out = console()
    out.print(fleet_table(found, wanted))
    for line in assumptions(wanted, gpu):
        out.print(line, markup=False)
