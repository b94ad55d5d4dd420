"""`octavo accuracy`: what a cache format costs, on a text of the user's or on benchmark tasks.

Theory first, then what was measured. Tables go to stdout, progress to stderr; with --json stdout is one document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli.accuracy_options import TaskOptions, TextOptions
from octavo.cli.candidates import BASELINE, COMPARED, baseline_of, candidates, formats_option, with_baseline
from octavo.cli.loading import LoadOptions
from octavo.cli.options import (
    CalibrationPath,
    Json,
    OtherGranularity,
    OtherHeadroom,
    Ray,
    Replicas,
    budget_option,
    check_calibration,
    check_replicas,
    numbers,
    of_model,
    on_ray,
    option,
    takes,
)
from octavo.errors import OctavoError
from octavo.measure.budget import DEFAULT, Budget

if TYPE_CHECKING:
    from octavo.measure.candidate import Candidate
    from octavo.measure.tasks.run import Elsewhere
    from octavo.models.model import Model
    from octavo.progress import Count
    from octavo.ray.measuring import Workers

# float32 products, here and on a cluster, as in tune: rounding to bf16 moves answers four times as far as kv8 does.
EXACT = {"pairs": False}


@takes(LoadOptions, TextOptions, TaskOptions)
def accuracy(
    options: LoadOptions,
    on_text: TextOptions,
    on_tasks: TaskOptions,
    kv: Annotated[
        str | None,
        formats_option(
            "Formats to compare, as in fp16,kv8; the first is the baseline, beside a single one the model's 16 bits. "
            + COMPARED
        ),
    ] = None,
    calibration: CalibrationPath = None,
    granularity: OtherGranularity = None,
    headroom: OtherHeadroom = None,
    baseline: Annotated[str | None, BASELINE] = None,
    data_dir: Annotated[Path | None, of_model("Where files of the named text or of the tasks are.")] = None,
    retrieval: Annotated[
        str | None,
        option(
            "Lengths like 2048,8192: values are looked up by their keys in lists of so many tokens.",
            panel="On long contexts",
        ),
    ] = None,
    budget: Annotated[str, budget_option("--windows, --window and --answers, or --limit")] = DEFAULT,
    ray: Ray = None,
    replicas: Replicas = None,
    json: Json = False,
) -> None:
    """Measure what a KV cache format of MODEL costs in accuracy."""
    reads = on_text.text is not None or (on_tasks.tasks is None and retrieval is None)
    if not reads:
        on_text.refuse()
    check_calibration(calibration, granularity, headroom)
    check_replicas(ray, replicas)
    if ray is not None and baseline is not None and on_tasks.tasks is not None:
        raise OctavoError("--baseline on tasks is measured here, not on Ray: leave --ray out")
    time = Budget.parse(budget)
    lengths = numbers(retrieval, "--retrieval") if retrieval is not None else []
    subtasks, skipped = on_tasks.subtasks(data_dir)
    source = on_text.open(data_dir) if reads else None
    model, begun = options.load(pairs=EXACT["pairs"]), perf_counter()
    from octavo.cli.tables.accuracy import show_retrieval, show_tasks, show_text, show_theory
    from octavo.measure.accuracy.results import about
    from octavo.measure.accuracy.retrieval import LEAST
    from octavo.measure.as_json import dumps

    compared = with_baseline(options, baseline, model, _candidates(model, kv, calibration))
    compared = [one.choosing(granularity, headroom) for one in compared]  # type: ignore[arg-type]  # checked
    context = min(model.bound.max_context, options.session_len or model.bound.max_context)
    for length in lengths:
        if not LEAST <= length <= context:
            raise OctavoError(f"--retrieval {length}: {model.name} can be asked about {LEAST} to {context:,} tokens")
    drawn = on_text.draw(model, source, len(compared), context, time) if source is not None else None
    found = about(model, compared)

    def tell(show: Callable[[dict[str, Any]], None]) -> None:
        if not json:
            show(found)

    tell(show_theory)
    with on_ray(ray, replicas, options.device) as workers:
        if source is not None and drawn is not None:
            measure = _comparing(options, baseline, model, compared, workers)
            found["text"] = on_text.read(model, compared, source.name, *drawn, lambda: time.over(begun), measure)
            tell(show_text)
        if lengths:
            found["retrieval"] = _retrieval(model, compared, lengths)
            tell(show_retrieval)
        if subtasks:
            tested = on_tasks.run(model, compared, subtasks, context, time, _asking(options, workers))
            found["tasks"] = tested | {"skipped": skipped}
            tell(show_tasks)
    if json:
        print(dumps(found))


def _candidates(model: Model, kv: str | None, calibration: Path | None) -> list[Candidate]:
    """The formats to compare, the baseline first; beside a single one the model's 16 bits."""
    from octavo.measure.candidate import Candidate

    found = candidates(model, kv, calibration)
    raw = model.bound.raw_format
    if len(found) == 1 and found[0].format != raw:
        found.insert(0, Candidate(str(raw), raw))
    return found


def _retrieval(model: Model, candidates: Sequence[Candidate], lengths: Sequence[int]) -> dict[str, Any]:
    """Rows of every format at every length. Says how long they take."""
    from octavo.cli.progress import say, telling
    from octavo.measure.accuracy.retrieval import make_context, retrieve
    from octavo.measure.budget import duration
    from octavo.measure.pace import Pace

    say("measuring a few steps")
    pace = Pace.measure(model.bound, max(lengths))
    say(f"looking up values: about {duration(len(candidates) * pace.read(sum(lengths)))}")
    rows = []
    with telling("looking up values") as tell:
        for length in lengths:
            asked = make_context(model.tokenizer, length)
            rows += [asdict(row) for row in retrieve(model, candidates, asked, length, tell)]
    return {"how": "measured", "rows": rows}


def _comparing(
    options: LoadOptions, baseline: str | None, model: Model, compared: Sequence[Candidate], workers: Workers | None
) -> Callable[[Count], Callable[..., Any]] | None:
    """What reads windows on the cluster, made of what is told their progress; None without a cluster."""
    if workers is None:
        return None
    from octavo.ray.measuring import comparing

    other = None
    if baseline is not None:
        other = baseline_of(options, baseline, model).loading() | EXACT | {"computing": model.bound.computes}
    return partial(comparing, options.loading() | EXACT, other, compared, workers)


def _asking(options: LoadOptions, workers: Workers | None) -> Elsewhere | None:
    if workers is None:
        return None
    from octavo.ray.measuring import asking

    return asking(options.loading() | EXACT, workers)
