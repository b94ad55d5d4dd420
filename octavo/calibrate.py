"""Run a model over windows of text and keep what its K and V looked like.

One pass, one window at a time, through the same attention that serves; memory does not grow with the number of
windows. RoPE is relative, so a window may stand at any position without changing the model's output: windows are spread
over the whole context, densest at its beginning, where most rows of most sessions are. A model for which that is not so
(learned positions, queries scaled by position) is recognized by its scores, and its windows stay at position 0.

`calibration_for` is what serves: a format that must not go without statistics gets them made first, from a short text.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from octavo.cache.store import KVCache
from octavo.engine.reading import Reading
from octavo.errors import OctavoError
from octavo.models.bind import BoundModel
from octavo.models.model import BUNDLED, Model
from octavo.models.output import output_norms
from octavo.progress import Count
from octavo.quant.calibration import Calibration, Header
from octavo.quant.format import BLOCK, DEFAULT_GRANULARITY, DEFAULT_HEADROOM, Format, Granularity, validate_choice
from octavo.quant.statistics import LayerStatistics
from octavo.text import opening

FIRST_PAGE = BLOCK  # rows of a window that mean and std leave out: sinks, outliers that edges keep raw
NEAR = 128  # positions up to here get as many windows as each doubling beyond, see _offsets
FARTHEST = 1 << 17  # where windows end for a model that names no context of its own
SHORT = (8, 256)  # windows and tokens in each, of a calibration that is made before serving
PATIENCE = 60.0  # seconds that it may take
PROSE = BUNDLED / "evaluation.txt"
OUTSIDE = 1e-3  # share of a layer's values beyond its format's range from which on a warning is due
Observed = dict[int, LayerStatistics]  # by layer, of those that keep K and V
Observe = Callable[[Sequence[Sequence[int]], Sequence[int]], Observed]  # of windows and their offsets
SCORES_DIFFER = 0.05  # relative; bf16 rounding moves scores by about 1 %, a scale or a learned position by more


def calibrate(
    model: Model,
    windows: Sequence[Sequence[int]],
    *,
    dataset: str,
    granularity: Granularity = DEFAULT_GRANULARITY,
    headroom: float = DEFAULT_HEADROOM,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    observe: Observe | None = None,
) -> Calibration:
    """Observe `windows` of token ids, all of one length; `progress` is called with the number of windows done.
    `observe` does it in the place of `observed`, elsewhere.

    Raises OctavoError for windows that do not fit the model and for activations that are not finite.
    """
    validate_choice(granularity, headroom)
    bound = model.bound
    bound.expect_rows()
    length = _common_length(windows, bound.max_context)
    offsets = window_offsets(bound, len(windows), length, seed)
    if observe is None:
        kept = observed(model, windows, offsets, progress)
    else:
        kept = observe(windows, offsets)
    layers = _of_layers(bound, kept)
    for statistics, norms in zip(layers, output_norms(bound), strict=True):
        statistics.projected_by(norms)
    header = Header(
        fingerprint=model.fingerprint,
        dataset=dataset,
        samples=len(windows),
        seqlen=length,
        tokens=len(windows) * length,
        positions=(min(offsets), max(offsets) + length - 1),
        granularity=granularity,
        headroom=headroom,
        rotary=bound.rotary,
    )
    return Calibration(header, [statistics.summary() for statistics in layers])


def observed(
    model: Model,
    windows: Sequence[Sequence[int]],
    offsets: Sequence[int],
    progress: Callable[[int], None] | None = None,
    first: int = 0,
) -> Observed:
    """What the K and V of `windows` look like, each of which stands at its offset; `first` is the number of the first
    one. Of parts of the windows, merged, it is that of all."""
    bound, length = model.bound, len(windows[0])
    reading = Reading(bound)
    kept = {
        i: LayerStatistics(shape.kv_heads, shape.k_dim, shape.v_dim)
        for i, shape in enumerate(bound.shapes)
        if shape.shares is None
    }
    layers = _of_layers(bound, kept)
    left_out = FIRST_PAGE if length > FIRST_PAGE else 0
    for done, (window, offset) in enumerate(zip(windows, offsets, strict=True), first):
        read = [0] * len(bound.layers)  # rows of this window, by layer

        def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, done: int = done, read: list[int] = read) -> None:
            for name, x in (("Q", q), ("K", k), ("V", v)):
                if not torch.isfinite(x).all():
                    raise OctavoError(
                        f"{name} of layer {layer} is not finite in sample {done}: the model overflows in "
                        f"{bound.dtype}; load it with --dtype bf16 or fp32, or check its weights"
                    )
            skip = max(0, left_out - read[layer])
            read[layer] += len(q)
            layers[layer].read_by(q[skip:])
            if layer in kept:
                kept[layer].update(k, v, skip)

        reading.run(window, observe, torch.arange(offset, offset + length))
        if progress is not None:
            progress(done + 1 - first)
    return kept


def _of_layers(bound: BoundModel, kept: Observed) -> list[LayerStatistics]:
    """Of every layer; several may share what one keeps."""
    return [kept[i if shape.shares is None else shape.shares] for i, shape in enumerate(bound.shapes)]


def calibration_for(
    model: Model,
    given: str | Path | Calibration | None,
    format: Format,
    progress: Count | None = None,
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

    def watch(done: int) -> None:
        ends.append(time.perf_counter())
        seconds = (ends[-1] - ends[0]) * len(windows)  # the first window warms up
        if done == 2 and seconds > PATIENCE:
            raise OctavoError(
                f"{format} needs a calibration of {model.name}, which takes about {seconds / 60:.0f} minutes here: run "
                f"`octavo calibrate {model.argument} --calib-dataset {PROSE} --calib-samples {len(windows)} "
                f"--calib-seqlen {len(windows[0])}` first, or use --kv kv8, which needs none"
            )
        if progress is not None:
            progress(done, len(windows))

    made = calibrate(model, windows, dataset="short: English prose, before serving", progress=watch)
    if not model.synthetic:
        try:
            made.save(model.work_dir)
        except OctavoError as error:
            warnings.warn(f"{error}; it is made again next time", stacklevel=3)
    return model.calibration(made, format)


def warn_uncalibrated(model: Model, format: Format, stacklevel: int = 3) -> None:
    """Say what serving `format` without a calibration costs."""
    warnings.warn(
        f"{format} runs without a calibration: on models with key biases it then loses thirty times as "
        f"much and more. `octavo calibrate {model.argument}` mends that",
        stacklevel=stacklevel,
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


def _common_length(windows: Sequence[Sequence[int]], max_context: int) -> int:
    if not windows:
        raise OctavoError("there is nothing to calibrate on: no window of text was given")
    lengths = {len(window) for window in windows}
    if len(lengths) > 1:
        raise OctavoError(f"calibration windows must be of one length, not of {min(lengths)} to {max(lengths)} tokens")
    length = lengths.pop()
    if not 1 < length <= max_context:
        raise OctavoError(
            f"calibration windows of {length} tokens do not fit: the model's context is {max_context}; "
            "set --calib-seqlen between 2 and that"
        )
    return length


def window_offsets(bound: BoundModel, count: int, length: int, seed: int) -> list[int]:
    """Where each window starts: denser the nearer to 0, from there to the context's end, in random order; all at 0
    where position matters. They are even in log(1 + position/NEAR)."""
    last = min(bound.max_context, FARTHEST) - length
    if last <= 0 or not shift_invariant(bound, last):
        return [0] * count
    steps = [i / max(count - 1, 1) for i in range(count)]
    spread = [round(NEAR * ((1 + last / NEAR) ** step - 1)) for step in steps]
    random.Random(seed).shuffle(spread)
    return spread


def shift_invariant(bound: BoundModel, offset: int) -> bool:
    """Whether the attention scores of a text stay the same when it is placed `offset` positions later.

    Each row is made to attend to itself alone, so that all layers see the same in both places: else what RoPE's angles
    are rounded by at far positions grows from layer to layer, and models with large keys seem to depend on position.
    """
    n = 16
    ids = bound.random_tokens(n)
    scores: dict[int, list[Tensor]] = {0: [], offset: []}
    for start, seen in scores.items():

        def record(_layer: int, q: Tensor, k: Tensor, v: Tensor, seen: list[Tensor] = seen) -> Tensor:
            group = q.shape[1] // k.shape[1]
            seen.append(torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, 1)).cpu())
            return v.repeat_interleave(group, 1)

        Reading(bound).run(ids, record, torch.arange(start, start + n))
    return all(
        (moved - placed).norm() <= SCORES_DIFFER * placed.norm()
        for placed, moved in zip(scores[0], scores[offset], strict=True)
    )


def warn_outside(model: Model, cache: KVCache, format: Format) -> None:
    """Warn where a cache's format cannot hold the values that the model has written: answers are then wrong."""
    shares = {
        f"{side} of layer {i}": share
        for i, kv in enumerate(cache.saturation())
        for side, share in zip("KV", kv, strict=True)
    }
    where, worst = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    if worst > OUTSIDE:
        warnings.warn(
            f"{worst:.1%} of the values in {where} are larger than {format} can say here, so answers may be wrong: "
            f"`octavo calibrate {model.argument}` on text like this one, or use --kv bf16",
            stacklevel=3,
        )
