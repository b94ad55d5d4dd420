"""`octavo report`: everything about a model's cache on one page, to be sent to a colleague."""

from pathlib import Path
from typing import Annotated

from octavo.cli.candidates import BASELINE, load_baseline
from octavo.cli.loading import LoadOptions
from octavo.cli.options import TEXTS, amount, budget_option, calibration_option, option, takes, tell_loading
from octavo.measure.budget import Budget

DEFAULT = "5m"


@takes(LoadOptions)
def report(
    options: LoadOptions,
    out: Annotated[Path, option("Directory that the report is written into.")] = Path("report"),
    calibration: Annotated[
        Path | None, calibration_option("[default: beside the model, else one made for the report]")
    ] = None,
    baseline: Annotated[str | None, BASELINE] = None,
    text: Annotated[str | None, option(f"What is read: {TEXTS}. [default: a bundled English text]")] = None,
    memory: Annotated[
        str | None,
        option("Memory that sessions are counted in, like 80GiB. [default: this machine's]", callback=amount),
    ] = None,
    budget: Annotated[str, budget_option()] = DEFAULT,
    json: Annotated[bool, option("The numbers as one JSON document on stdout, too.", "--json")] = False,
) -> None:
    """Write what MODEL's cache saves and costs as a web page, as Markdown and as JSON."""
    from octavo.corpus import load_texts

    time = Budget.parse(budget)
    next(iter(load_texts(text)))  # refuses what cannot be read before the model is loaded
    tell_loading(options.model)
    from octavo.measure.report.picture import require_directory

    require_directory(out)
    from octavo.cli.progress import progress
    from octavo.measure.as_json import dumps
    from octavo.measure.report.page import render
    from octavo.measure.report.survey import gather
    from octavo.units import parse_bytes

    size = parse_bytes(memory) if memory is not None else None
    model = options.load(told=True)
    sixteen = load_baseline(options, baseline, model) if baseline is not None else None
    with progress() as bar:
        task = bar.add_task("examining the model", total=100)
        found = gather(
            model,
            calibration,
            text,
            size,
            sixteen,
            lambda what, share: bar.update(task, description=what, completed=round(100 * share)),
            time,
            lambda line: bar.console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
        render(found, out)
        bar.update(task, description="report", completed=100)
    print(dumps(found.document()) if json else f"{out / 'report.html'}\n{out / 'report.md'}\n{out / 'report.json'}")
