"""`octavo calibrate`: run the model over texts once and keep the ranges of its K and V beside it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.options import LoadOptions, takes
from octavo.cli.progress import progress
from octavo.errors import OctavoError
from octavo.quant.format import DEFAULT_GRANULARITY, DEFAULT_HEADROOM

if TYPE_CHECKING:
    from octavo.corpus import Texts
    from octavo.models.model import Model

SELF = "self"


@takes(LoadOptions)
def calibrate(
    options: LoadOptions,
    calib_dataset: Annotated[
        str | None,
        typer.Option(
            help="ptb, c4, wikitext2, pileval, a .txt or .jsonl file, or self: the model writes. [default: self]"
        ),
    ] = None,
    calib_samples: Annotated[int, typer.Option(help="Windows of text.", min=1)] = 128,
    calib_seqlen: Annotated[
        int | None, typer.Option(help="Tokens in a window. [default: 2048, or the model's context]", min=2)
    ] = None,
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
) -> None:
    """Calibrate MODEL for the int8 KV cache."""
    from rich.console import Console

    from octavo.calibrate import calibrate as observe
    from octavo.cli.tables.calibrate import range_table
    from octavo.corpus import load_texts
    from octavo.quant.calibration import validate_choice

    validate_choice(granularity, headroom)
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
    source, windows = draw_windows(model, calib_dataset, texts, calib_samples, calib_seqlen, seed)
    with progress() as bar:
        task = bar.add_task("observing K and V", total=len(windows))
        calibration = observe(
            model,
            windows,
            dataset=source,
            granularity=granularity,  # type: ignore[arg-type]  # validated above
            headroom=headroom,
            seed=seed,
            progress=lambda done: bar.update(task, completed=done),
        )
    path = calibration.save(directory)
    console = Console()
    console.print(range_table(calibration))
    header = calibration.header
    console.print(
        f"{header.samples} windows of {header.seqlen} tokens of {header.dataset}, at positions "
        f"{header.positions[0]} to {header.positions[1]}"
    )
    console.print(f"saved to {path}", soft_wrap=True)


def draw_windows(
    model: Model, dataset: str | None, texts: Texts | None, count: int, length: int | None, seed: int
) -> tuple[str, list[list[int]]]:
    """Name of what was read, and the windows to observe: of `texts`, or of the model's own if None."""
    from octavo.llm import LLM
    from octavo.text_windows import self_windows, token_windows

    length = min(2048, model.bound.max_context) if length is None else length
    if length > model.bound.max_context:
        raise OctavoError(f"--calib-seqlen {length} is beyond the model's context of {model.bound.max_context}")
    if model.synthetic:
        if dataset is not None:
            raise OctavoError("--load-format dummy observes one random batch: leave --calib-dataset out")
        words = "synthetic: one random batch, for weights that are random too"
        return words, model.bound.random_tokens(1, length, seed=seed)
    if texts is None:
        with progress() as bar:
            task = bar.add_task("sampling text from the model", total=count * length)
            llm = LLM(model, session_len=min(length + 1, model.bound.max_context), max_batch_size=16)
            windows = self_windows(
                llm, count, length, seed=seed, progress=lambda done, _: bar.update(task, completed=done)
            )
        return "self: text sampled from the model", windows
    return texts.name, list(token_windows(texts, model.tokenizer, count, length, seed=seed))


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
