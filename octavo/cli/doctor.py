"""`octavo doctor`: will this model work, and will its cache quantize well?"""

from typing import Annotated

import typer

from octavo.cli.loading import LoadOptions
from octavo.cli.options import TEXTS, Json, budget_option, option, takes
from octavo.corpus import load_texts
from octavo.errors import Unsupported
from octavo.measure.budget import DEFAULT, Budget


@takes(LoadOptions)
def doctor(
    options: LoadOptions,
    text: Annotated[
        str | None, option(f"What is read: {TEXTS}, or self: the model writes. [default: a bundled English text]")
    ] = None,
    budget: Annotated[str, budget_option()] = DEFAULT,
    json: Json = False,
) -> None:
    """Examine MODEL: does it work, and which cache formats suit it? Status 0: it is healthy; 1: it is refused, or
    something is advised against."""
    time = Budget.parse(budget)
    if text != "self":
        next(iter(load_texts(text)))  # refuses what cannot be read before the model is loaded
    try:
        model = options.load(say=False, pairs=False)  # said in the table; float32 products as in accuracy
    except Unsupported as refusal:
        from octavo.measure.doctor.diagnosis import Diagnosis

        found, machine = Diagnosis.refused(options.model or "pamphlet", str(refusal)), None
    else:
        from octavo.cli.progress import telling
        from octavo.measure.doctor.diagnose import diagnose
        from octavo.measure.machine import describe

        with telling("measuring a few steps") as tell:
            found = diagnose(model, text, time, tell, tell.say)
        machine = describe(model.bound.device)
    from octavo.cli.tables.doctor import show
    from octavo.measure.as_json import dumps

    if json:
        print(dumps({"command": "doctor", "machine": machine, **found.document()}))
    else:
        show(found)
    if not found.healthy:
        raise typer.Exit(1)
