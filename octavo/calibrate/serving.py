"""The calibration that a format is served with: the one there is, or a short one made first from the bundled prose."""

import time
import warnings
from pathlib import Path

from octavo.cache.store import KVCache
from octavo.calibrate.observing import calibrate
from octavo.errors import OctavoError
from octavo.models.locate import PROSE
from octavo.models.model import Model
from octavo.progress import Count, silent
from octavo.quant.calibration import Calibration
from octavo.quant.format import Format, Granularity
from octavo.text import opening

SHORT = (8, 256)  # windows and tokens in each, of a calibration that is made before serving
PATIENCE = 60.0  # seconds that it may take
OUTSIDE = 1e-3  # share of a layer's values beyond its format's range from which on a warning is due


def calibration_for(
    model: Model, given: str | Path | Calibration | None, format: Format, progress: Count = silent
) -> Calibration | None:
    """The calibration to serve `format` with, as `Model.calibration` finds it.

    For a format that calibrates first one is made where there is none, and saved as `octavo calibrate` does;
    `progress` is called with the number of windows done and of all. Raises OctavoError if that takes too long.
    """
    first = format.calibrates_first and bool(model.bound.shapes)
    if given is not None or not first or model.calibration_file() is not None:
        return model.calibration(given, format)
    windows = _short_windows(model)
    warnings.warn(
        f"{format} needs a calibration, and {model.name} has none yet: making one from {len(windows)} short windows of "
        f"English prose, kept in {model.work_dir}. `octavo calibrate {model.argument}` makes it from other texts",
        stacklevel=3,
    )
    ends: list[float] = []

    def watch(done: int, total: int) -> None:
        ends.append(time.perf_counter())
        seconds = (ends[-1] - ends[0]) * len(windows)  # the first window warms up
        if done == 2 and seconds > PATIENCE:
            raise OctavoError(
                f"{format} needs a calibration of {model.name}, which takes about {seconds / 60:.0f} minutes here: run "
                f"`octavo calibrate {model.argument} --calib-dataset {PROSE} --calib-samples {len(windows)} "
                f"--calib-seqlen {len(windows[0])}` first, or use --kv kv8, which needs none"
            )
        progress(done, total)

    made = calibrate(model, windows, dataset="short: English prose, before serving", progress=watch)
    if not model.synthetic:
        try:
            made.save(model.work_dir)
        except OctavoError as error:
            warnings.warn(f"{error}; it is made again next time", stacklevel=3)
    return model.calibration(made, format)


def choose_scales(
    found: Calibration | None, format: Format, granularity: Granularity | None, headroom: float | None
) -> Calibration | None:
    """The calibration with what is asked for in place of its own defaults."""
    if (granularity, headroom) == (None, None):
        return found
    if found is None:
        raise OctavoError(f"granularity and headroom choose from a calibration; {format} has none here")
    return found.choosing(granularity, headroom)


def warn_uncalibrated(model: Model, format: Format, stacklevel: int = 3) -> None:
    """Say what serving `format` without a calibration costs."""
    warnings.warn(
        f"{format} runs without a calibration: on models with key biases it then loses thirty times as "
        f"much and more. `octavo calibrate {model.argument}` mends that",
        stacklevel=stacklevel,
    )


def warn_outside(model: Model, cache: KVCache, format: Format) -> None:
    """Warn where a cache's format cannot hold the values that the model has written: answers are then wrong."""
    worst, where = cache.worst_saturation()
    if worst > OUTSIDE:
        warnings.warn(
            f"{worst:.1%} of the values in {where} are larger than {format} can say here, so answers may be wrong: "
            f"`octavo calibrate {model.argument}` on text like this one, or use --kv bf16",
            stacklevel=3,
        )


def _short_windows(model: Model) -> list[list[int]]:
    """Pieces of the bundled prose from its beginning to its end, each opened as a session is. A model without a
    tokenizer sees random tokens."""
    count, length = SHORT[0], min(SHORT[1], model.bound.max_context)
    if model.tokenizer is None:
        return model.bound.random_tokens(count, length)
    prefix = opening(model.tokenizer)[: length - 1]
    text = PROSE.read_text(encoding="utf-8")
    tokens = list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    body = length - len(prefix)
    starts = [(len(tokens) - body) * i // (count - 1) for i in range(count)]
    return [prefix + tokens[start : start + body] for start in starts]
