"""`octavo accuracy`: what a cache format costs, on a text of the user's or on benchmark tasks.

Theory first, then what was measured. Tables go to stdout, progress to stderr; with --json stdout is one document.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli.candidates import BASELINE, COMPARED, baseline_of, candidates, formats_option, load_baseline
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
    on_ray,
    option,
    takes,
)
from octavo.errors import OctavoError
from octavo.measure.accuracy.sizes import ANSWERS, LEAST, WANTED
from octavo.measure.budget import DEFAULT, Budget, Windows

if TYPE_CHECKING:
    from octavo.corpus import Texts
    from octavo.measure.candidate import Candidate
    from octavo.measure.tasks.run import Elsewhere
    from octavo.models.model import Model
    from octavo.ray.cluster import Placement


def about_text(help: str, *names: str, **more: Any) -> Any:
    return option(help, *names, panel="On a text", **more)


def about_tasks(help: str, *names: str, **more: Any) -> Any:
    return option(help, *names, panel="On benchmark tasks", **more)


@takes(LoadOptions)
def accuracy(
    options: LoadOptions,
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
    data_dir: Annotated[Path | None, option("Where files of the named text or of the tasks are.")] = None,
    text: Annotated[
        str | None,
        about_text(
            "A .txt or .jsonl file, or ptb, c4, wikitext2, pileval. [default: evaluation.txt of the bundled model]"
        ),
    ] = None,
    windows: Annotated[
        int | None,
        about_text(f"At most so many windows of it. [default: {WANTED.count}, or what --budget allows]", min=1),
    ] = None,
    window: Annotated[
        int | None, about_text(f"Tokens in a window. [default: {WANTED.length}, or what --budget allows]", min=2)
    ] = None,
    answers: Annotated[
        int | None,
        about_text(
            f"Beginnings of windows that are answered, to see where answers part. [default: {ANSWERS.count}, or what "
            "--budget allows]",
            min=0,
        ),
    ] = None,
    retrieval: Annotated[
        str | None,
        option(
            "Lengths like 2048,8192: values are looked up by their keys in lists of so many tokens.",
            panel="On long contexts",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        about_tasks(
            "all, or some of winogrande, nq_open, gsm8k, bbh, openbookqa, openbookqa_fact, eprstmt, crows_pairs, "
            "bbh/word_sorting, …"
        ),
    ] = None,
    limit: Annotated[
        int | None,
        about_tasks("The first so many documents, of bbh of each subset. [default: what --budget allows]", min=1),
    ] = None,
    shots: Annotated[
        int | None,
        about_tasks(
            "Examples before each question, the same before all; crows_pairs takes none, bbh has its own. [default: as "
            "the task says]",
            min=0,
        ),
    ] = None,
    max_batch_size: Annotated[int | None, about_tasks("Documents at a time. [default: 16]", min=1)] = None,
    results: Annotated[
        Path | None,
        about_tasks("Where results are kept, so that a run can go on. [default: beside the calibration]"),
    ] = None,
    budget: Annotated[str, budget_option("--windows, --window and --answers, or --limit")] = DEFAULT,
    ray: Ray = None,
    replicas: Replicas = None,
    json: Json = False,
) -> None:
    """Measure what a KV cache format of MODEL costs in accuracy."""
    reads = text is not None or (tasks is None and retrieval is None)
    of_tasks = {"--limit": limit, "--shots": shots, "--max-batch-size": max_batch_size, "--results": results}
    _refuse(of_tasks, tasks is not None, "--tasks")
    _refuse({"--windows": windows, "--window": window, "--answers": answers}, reads, "--text")
    check_calibration(calibration, granularity, headroom)
    check_replicas(ray, replicas)
    if ray is not None and baseline is not None and tasks is not None:
        raise OctavoError("--baseline on tasks is measured here, not on Ray: leave --ray out")
    time = Budget.parse(budget)
    lengths = numbers(retrieval, "--retrieval") if retrieval is not None else []
    parts, skipped = _parts(tasks, data_dir) if tasks is not None else ([], {})
    source = _text(text, data_dir) if reads else None
    model, begun = options.load(), perf_counter()
    from octavo.cli.progress import telling
    from octavo.cli.tables.accuracy import show_retrieval, show_tasks, show_text, show_theory
    from octavo.measure.accuracy.results import about, on_text
    from octavo.measure.as_json import dumps
    from octavo.measure.candidate import beside
    from octavo.text_windows import consecutive_windows

    compared = _candidates(model, kv, calibration, granularity, headroom)
    if baseline is not None:
        compared = beside(load_baseline(options, baseline, model), model, compared)
    context = min(model.bound.max_context, options.session_len or model.bound.max_context)

    def over(done: int) -> bool:
        """Whether the budget ends the reading of windows that were not asked for by number."""
        return (windows, window) == (None, None) and done >= LEAST.count and time.over(begun)

    if source is not None:
        size, asked = _fit(model, source.name, len(compared), (windows, window, answers), context, time)
        read = consecutive_windows(source, model.tokenizer, size.length, size.count)
    found = about(model, compared)
    if not json:
        show_theory(found)
    with on_ray(ray, replicas, options.device) as place:
        if source is not None:
            with telling("reading") as tell:
                measure = _comparing(options, baseline, model, compared, place, lambda n: tell("reading", n, len(read)))
                found["text"] = on_text(model, compared, source.name, read, asked, tell, over, measure)
            if not json:
                show_text(found)
        if lengths:
            found["retrieval"] = _retrieval(model, compared, lengths, context)
            if not json:
                show_retrieval(found)
        if parts:
            where = results or model.work_dir / "accuracy"
            sizes = {"limit": limit, "session_len": context, "max_batch_size": max_batch_size or 16, "shots": shots}
            elsewhere = _asking(options, place)
            tested = _on_tasks(model, compared, parts, where, time, sizes, elsewhere)
            found["tasks"] = tested | {"skipped": skipped}
            if not json:
                show_tasks(found)
    if json:
        print(dumps(found))


def _refuse(given: dict[str, Any], right: bool, other: str) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names and not right:
        raise OctavoError(f"{names[0]} goes with {other}, which is not given")


def _parts(tasks: str, data_dir: Path | None) -> tuple[list[Any], dict[str, str]]:
    from octavo.measure.tasks import data_files, require_harness, select

    parts, skipped = select(tasks, data_dir)
    require_harness()
    for part in parts:
        data_files.check(part)
    return parts, skipped


def _text(text: str | None, data_dir: Path | None) -> Texts:
    from octavo.corpus import load_texts
    from octavo.models.locate import BUNDLED

    texts = load_texts(str(BUNDLED / "evaluation.txt") if text is None else text, data_dir, "test")
    next(iter(texts))  # refuses what cannot be read
    return texts


def _candidates(
    model: Model, kv: str | None, calibration: Path | None, granularity: str | None, headroom: float | None
) -> list[Candidate]:
    """The formats to compare, the baseline first; beside a single one the model's 16 bits."""
    from octavo.measure.candidate import Candidate

    found = candidates(model, kv, calibration, granularity, headroom)
    raw = model.bound.raw_format
    if len(found) == 1 and found[0].format != raw:
        found.insert(0, Candidate(str(raw), raw))
    return found


def _fit(
    model: Model,
    name: str,
    formats: int,
    given: tuple[int | None, int | None, int | None],
    context: int,
    budget: Budget,
) -> tuple[Windows, Windows]:
    """The windows to read and the answers to write. Says how many, and how long they take."""
    from octavo.cli.progress import say
    from octavo.measure.accuracy.sizes import choose
    from octavo.measure.pace import Pace

    length = given[1]
    if length is not None and length > context:
        raise OctavoError(
            f"a window of {length} tokens is longer than {model.name}'s sessions of {context}: lower --window"
        )
    start = perf_counter()
    say("measuring a few steps")
    pace = Pace.measure(model.bound, length or min(WANTED.length, context))
    read, write = choose(pace, budget.less(perf_counter() - start), formats, given, context)
    say(f"{name}: {read.of(formats)}")
    if write.size.count:
        say(f"greedy answers: {write.of(formats)}")
    return read.size, write.size


def _retrieval(model: Model, candidates: Sequence[Candidate], lengths: Sequence[int], context: int) -> dict[str, Any]:
    """Rows of every format at every length. Says how long they take."""
    from octavo.cli.progress import say, telling
    from octavo.measure.accuracy.retrieval import LEAST, contexts, retrieve
    from octavo.measure.budget import duration
    from octavo.measure.pace import Pace

    for length in lengths:
        if not LEAST <= length <= context:
            raise OctavoError(f"--retrieval {length}: {model.name} can be asked about {LEAST} to {context:,} tokens")
    say("measuring a few steps")
    pace = Pace.measure(model.bound, max(lengths))
    say(f"looking up values: about {duration(len(candidates) * pace.read(sum(lengths)))}")
    first, *others = candidates
    rows = []
    with telling("looking up values") as tell:
        for length in lengths:
            asked = contexts(model.tokenizer, length)
            rows += [asdict(row) for row in retrieve(model, first, others, asked, length, tell)]
    return {"how": "measured", "rows": rows}


def _comparing(
    options: LoadOptions,
    baseline: str | None,
    model: Model,
    compared: Sequence[Candidate],
    place: Placement | None,
    progress: Callable[[int], None],
) -> Callable[..., Any] | None:
    """What reads windows on the cluster; None without one. `progress` is called with how many have been read."""
    if place is None:
        return None
    from octavo.ray.measuring import comparing

    read = 0

    def add(windows: int) -> None:
        nonlocal read
        read += windows
        progress(read)

    other = None
    if baseline is not None:
        other = baseline_of(options, baseline, model).loading() | {"computing": model.bound.computes}
    return comparing(options.loading(), other, compared, place, add)


def _asking(options: LoadOptions, place: Placement | None) -> Elsewhere | None:
    if place is None:
        return None
    from octavo.ray.measuring import asking

    return asking(options.loading(), place)


def _on_tasks(
    model: Model,
    candidates: Sequence[Candidate],
    parts: Sequence[Any],
    directory: Path,
    budget: Budget,
    sizes: dict[str, Any],
    elsewhere: Elsewhere | None,
) -> dict[str, Any]:
    from octavo.cli.progress import telling
    from octavo.measure.tasks.results import Results
    from octavo.measure.tasks.run import run

    try:
        with telling("loading tasks") as tell:
            rows = run(
                model,
                candidates,
                parts,
                Results(directory),
                budget=budget,
                progress=tell,
                say=tell.say,
                elsewhere=elsewhere,
                **sizes,
            )
    except KeyboardInterrupt:
        print(f"interrupted: what is done is kept in {directory}; the same command goes on", file=sys.stderr)
        raise
    found = [asdict(row) | {"solved": row.solved} for row in rows]
    return {"how": "measured", **sizes, "results": str(directory), "rows": found}
