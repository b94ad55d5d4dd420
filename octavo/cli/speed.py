"""`octavo speed`: tokens per second and latencies of each cache format, beside what the memory's bandwidth allows."""

from typing import Annotated

from octavo.cli.candidates import BASELINE, COMPARED, candidates, formats_option, with_baseline
from octavo.cli.loading import LoadOptions
from octavo.cli.options import CalibrationPath, Json, numbers, option, takes, tell_loading


@takes(LoadOptions)
def speed(
    options: LoadOptions,
    kv: Annotated[
        str | None, formats_option(f"Formats to compare, as in bf16,kv8; the first is the baseline. {COMPARED}")
    ] = None,
    calibration: CalibrationPath = None,
    baseline: Annotated[str | None, BASELINE] = None,
    batch_size: Annotated[str, option("Sessions at a time: one number, or several with commas.")] = "1,8",
    context: Annotated[str, option("Tokens of a session, prompt and answer: one number, or several.")] = "512,2048",
    tokens: Annotated[int, option("Decode steps that are timed in a round.", min=1)] = 32,
    rounds: Annotated[int, option("Times that every format takes its turn.", min=1)] = 3,
    json: Json = False,
) -> None:
    """Measure prefill and decode of MODEL in each format."""
    batch_sizes, contexts = numbers(batch_size, "--batch-size"), numbers(context, "--context")
    tell_loading(options.model)
    from dataclasses import asdict
    from functools import partial

    from octavo.cli.progress import telling
    from octavo.cli.tables import console
    from octavo.cli.tables.speed import ceiling_table, speed_table
    from octavo.measure import machine
    from octavo.measure.as_json import dumps
    from octavo.measure.speed.roofline import bandwidth, ceilings
    from octavo.measure.speed.throughput import check, measure

    model = options.load(told=True)
    compared = with_baseline(options, baseline, model, candidates(model, kv, calibration))
    check(model, batch_sizes, contexts, tokens)
    rate = bandwidth(model.bound.device)
    theory = ceilings(model.bound, compared, batch_sizes, contexts, tokens, rate)
    about, out = machine.describe(model.bound.device), console()
    if not json:
        out.print(f"{model.name} on {machine.sentence(about)}", markup=False)
        out.print(f"a plain streaming read reaches {rate / 1e9:.1f} GB/s (measured)\n")
        out.print(ceiling_table(theory))
    with telling("measuring") as tell:
        tell_round = partial(tell, "measuring")
        found = measure(
            model, compared, batch_sizes, contexts, theory, tokens=tokens, rounds=rounds, progress=tell_round
        )
    if not json:
        out.print(speed_table(found))
        first = compared[0].name
        out.print(f"{rounds} rounds of {tokens} decode steps; ratios to {first} within a round, and their range")
        return
    content = {
        "command": "speed",
        "model": model.name,
        "machine": about,
        "rounds": rounds,
        "tokens": tokens,
        "baseline": compared[0].name,
        "bandwidth": {"how": "measured", "bytes_per_second": rate},
        "theory": [{"how": "computed", **asdict(row)} for row in theory],
        "speed": [{"how": "measured", **asdict(row)} for row in found],
    }
    print(dumps(content))
