"""Run a model over windows of text and keep what its K and V looked like.

One pass, one window at a time, through the same attention that serves; memory does not grow with the number of windows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.calibrate.positions import window_offsets
from octavo.engine.reading import Reading
from octavo.errors import OctavoError
from octavo.models.bind import BoundModel
from octavo.models.model import Model
from octavo.models.output import output_norms
from octavo.progress import Count, silent
from octavo.quant.calibration import Calibration, Header
from octavo.quant.format import BLOCK, DEFAULT_GRANULARITY, DEFAULT_HEADROOM, Granularity, validate_choice
from octavo.quant.statistics import LayerStatistics

FIRST_PAGE = BLOCK  # rows of a window that mean and std leave out: sinks, outliers that edges keep raw
Observed = dict[int, LayerStatistics]  # by layer, of those that keep K and V
Observe = Callable[[Sequence[Sequence[int]], Sequence[int]], Observed]  # of windows and their offsets


def calibrate(
    model: Model,
    windows: Sequence[Sequence[int]],
    *,
    dataset: str,
    granularity: Granularity = DEFAULT_GRANULARITY,
    headroom: float = DEFAULT_HEADROOM,
    seed: int = 0,
    progress: Count = silent,
    observe: Observe | None = None,
) -> Calibration:
    """Observe `windows` of token ids, all of one length; `progress` is called with the number of windows done
    and of all. `observe` does it in the place of `observed`, elsewhere.

    Raises OctavoError for windows that do not fit the model and for activations that are not finite.
    """
    validate_choice(granularity, headroom)
    bound = model.bound
    bound.expect_rows()
    length = _common_length(windows, bound.max_context)
    offsets = window_offsets(bound, len(windows), length, seed)
    kept = observe(windows, offsets) if observe is not None else observed(model, windows, offsets, progress)
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
    progress: Count = silent,
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
        progress(done + 1 - first, len(windows))
    return kept


def _of_layers(bound: BoundModel, kept: Observed) -> list[LayerStatistics]:
    """Of every layer; several may share what one keeps."""
    return [kept[i if shape.shares is None else shape.shares] for i, shape in enumerate(bound.shapes)]


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
