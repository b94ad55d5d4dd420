"""`octavo doctor`: will this model work, and will its cache quantize well?"""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.cli.options import LoadOptions, takes
from octavo.errors import Unsupported


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
    from octavo.cli.tables.doctor import show
    from octavo.measure.as_json import dumps
    from octavo.measure.doctor.diagnose import diagnose
    from octavo.measure.doctor.diagnosis import Diagnosis
    from octavo.measure.machine import describe

    try:
        model = options.load(say=False)  # it is in the table
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
        show(found)
    if not found.healthy:
        raise typer.Exit(1)
