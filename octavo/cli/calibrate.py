"""`octavo calibrate`: run the model over texts once and keep the ranges of its K and V beside it."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.options import RAY, REPLICAS, LoadOptions, budget_option, check_replicas, on_ray, takes
from octavo.cli.progress import progress, say
from octavo.errors import OctavoError
from octavo.measure.budget import DEFAULT, Budget, Windows
from octavo.quant.format import DEFAULT_GRANULARITY, DEFAULT_HEADROOM, validate_choice

if TYPE_CHECKING:
    from octavo.corpus import Texts
    from octavo.models.model import Model
    from octavo.quant.calibration import Calibration

SELF = "self"
WANTED, LEAST = Windows(16, 512), Windows(4, 256)  # docs/FORMATS.md: what more would gain
WIDTH = 16  # windows that the model writes at a time


@takes(LoadOptions)
def calibrate(
    options: LoadOptions,
    calib_dataset: Annotated[
        str | None,
        typer.Option(
            help="ptb, c4, wikitext2, pileval, a .txt or .jsonl file, or self: the model writes. [default: self]"
        ),
    ] = None,
    calib_samples: Annotated[
        int | None, typer.Option(help=f"Windows of text. [default: {WANTED.count}, or what --budget allows]", min=1)
    ] = None,
    calib_seqlen: Annotated[
        int | None, typer.Option(help=f"Tokens in a window. [default: {WANTED.length}, or what --budget allows]", min=2)
    ] = None,
    budget: Annotated[str, budget_option("--calib-samples or --calib-seqlen")] = DEFAULT,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where the calibration is saved. [default: the model's directory, or a cache]")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where files of the named data sets are looked for first.")
    ] = None,
    granularity: Annotated[
        str, typer.Option(help="Default of this calibration: tensor, head or channel.")
    ] = DEFAULT_GRANULARITY,
    headroom: Annotated[
        float, typer.Option(help="Default of this calibration: range served over range seen.")
    ] = DEFAULT_HEADROOM,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    ray: Annotated[str | None, RAY] = None,
    replicas: Annotated[int | None, REPLICAS] = None,
) -> None:
    """Calibrate MODEL: see what its K and V are like, once. `int8` needs that, the other formats lose less with it."""
    from octavo.corpus import load_texts

    validate_choice(granularity, headroom)
    check_replicas(ray, replicas)
    time = Budget.parse(budget)
    texts = load_texts(calib_dataset, data_dir) if calib_dataset not in (None, SELF) else None
    model = options.load()
    if model.synthetic and work_dir is None:
        raise OctavoError("--load-format dummy makes a calibration of random weights: name a --work-dir for it")
    directory = work_dir or model.work_dir
    if work_dir is None and model.is_directory and directory != model.path:
        warnings.warn(
            f"nothing can be written in {model.path}: the calibration goes to {directory}, where Octavo finds it",
            stacklevel=2,
        )
    _require_writable(directory)
    source, windows, seconds = draw_windows(
        model, calib_dataset, texts, (calib_samples, calib_seqlen), WANTED, LEAST, time, seed
    )
    from octavo.calibrate import calibrate as observe

    with on_ray(ray, replicas, options.device) as place, progress() as bar:
        task = bar.add_task("observing K and V", total=len(windows), seconds=seconds)
        elsewhere = None
        if place is not None:
            from octavo.ray.measuring import observing

            elsewhere = observing(options.loading(), place, lambda done: bar.advance(task, done))
        calibration = observe(
            model,
            windows,
            dataset=source,
            granularity=granularity,  # type: ignore[arg-type]  # validated above
            headroom=headroom,
            seed=seed,
            progress=lambda done: bar.update(task, completed=done),
            observe=elsewhere,
        )
    path = calibration.save(directory)
    _show(options, calibration, path, work_dir)


def _show(options: LoadOptions, calibration: Calibration, path: Path, work_dir: Path | None) -> None:
    """What was seen, where it is kept, and what to do with it."""
    from rich.console import Console

    from octavo.cli.tables.calibrate import range_table

    console, header = Console(highlight=False, soft_wrap=True), calibration.header
    console.print(range_table(calibration))
    console.print(
        f"{header.samples} windows of {header.seqlen} tokens of {header.dataset}, at positions "
        f"{header.positions[0]} to {header.positions[1]}"
    )
    console.print(f"saved to {path}")
    words = ["octavo", "chat", *([options.model] if options.model else []), "--kv", "kv8"]
    words += ["--model-format", options.model_format] if options.model_format != "hf" else []
    words += ["--calibration", str(work_dir)] if work_dir is not None else []
    console.print(f"next: {shlex.join(words)}", markup=False)


def draw_windows(
    model: Model,
    dataset: str | None,
    texts: Texts | None,
    given: tuple[int | None, int | None],
    wanted: Windows,
    least: Windows,
    budget: Budget,
    seed: int,
) -> tuple[str, list[list[int]], float]:
    """Name of what was read, the windows to observe, and the seconds that this will take: of `texts`, or of the model's
    own if None. Their count and length are those `given`, or what the budget allows between `wanted` and `least`."""
    from octavo.llm import LLM
    from octavo.measure.pace import Pace
    from octavo.text_windows import CHAT_SHARE, self_windows, token_windows

    count, length = given
    context = model.bound.max_context
    if length is not None and length > context:
        raise OctavoError(f"--calib-seqlen {length} is beyond the model's context of {context}")
    wanted = Windows(count or wanted.count, length or min(wanted.length, context))
    least = wanted if count or length else least
    if model.synthetic:
        if dataset is not None:
            raise OctavoError("--load-format dummy observes one random batch: leave --calib-dataset out")
        words = "synthetic: one random batch, for weights that are random too"
        return words, model.bound.random_tokens(1, wanted.length, seed=seed), 0.0
    start = perf_counter()
    say("measuring a few steps")
    pace = Pace.measure(model.bound, wanted.length)
    chats = CHAT_SHARE if model.tokenizer.chat_template else 0

    def writing(size: Windows) -> float:
        """Of sampling the windows from the model, in two turns: texts, then answers in chats."""
        turns = (round(size.count * (1 - chats)), round(size.count * chats))
        full = sum(n // WIDTH * pace.write(WIDTH, size.length) + pace.write(n % WIDTH, size.length) * (n % WIDTH > 0)
                   for n in turns)  # fmt: skip
        return full if texts is None else 0.0

    fit = budget.less(perf_counter() - start).fit(wanted, least, lambda size: pace.read(size.tokens) + writing(size))
    count, length, seconds = fit.size.count, fit.size.length, pace.read(fit.size.tokens)
    say(f"{'text that the model writes' if texts is None else texts.name}: {fit}")
    if texts is not None:
        return texts.name, list(token_windows(texts, model.tokenizer, count, length, seed=seed)), seconds
    with progress() as bar:
        task = bar.add_task("sampling text from the model", total=count * length, seconds=writing(fit.size))
        llm = LLM(model, session_len=min(length + 1, context), max_batch_size=WIDTH)
        windows = self_windows(llm, count, length, seed=seed, progress=lambda done, _: bar.update(task, completed=done))
    return "self: text sampled from the model", windows, seconds


def _require_writable(directory: Path) -> None:
    """Fail before the work, not after it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".octavo-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OctavoError(
            f"nothing can be written in {directory} ({error.strerror}); name another with --work-dir"
        ) from None
