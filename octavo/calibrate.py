"""Run a model over windows of text and keep what its K and V looked like.

One pass, one window at a time, through the same attention that serves; memory does not grow with the number of
windows. RoPE is relative, so a window may stand at any position without changing the model's output: windows are spread
over the whole context, and the ranges hold for a session of any length. A model for which that is not so (learned
positions, queries scaled by position) is recognized by its scores, and its windows stay at position 0.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.engine.reading import Reading
from octavo.errors import OctavoError
from octavo.models.bind import BoundModel
from octavo.models.model import Model
from octavo.quant.calibration import Calibration, Header, validate_choice
from octavo.quant.format import DEFAULT_GRANULARITY, DEFAULT_HEADROOM, Granularity
from octavo.quant.statistics import Statistics

FARTHEST = 1 << 17  # where windows end for a model that names no context of its own
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
) -> Calibration:
    """Observe `windows` of token ids, all of one length; `progress` is called with the number of windows done.

    Raises OctavoError for windows that do not fit the model and for activations that are not finite.
    """
    validate_choice(granularity, headroom)
    bound = model.bound
    length = _common_length(windows, bound.max_context)
    offsets = _offsets(bound, len(windows), length, seed)
    reading = Reading(bound)
    observed = [
        None
        if shape.shares is not None
        else (Statistics(shape.kv_heads, shape.k_dim), Statistics(shape.kv_heads, shape.v_dim))
        for shape in bound.shapes
    ]
    for done, (window, offset) in enumerate(zip(windows, offsets, strict=True)):

        def observe(layer: int, _q: Tensor, k: Tensor, v: Tensor, done: int = done) -> None:
            if (both := observed[layer]) is not None:
                for statistics, x, side in zip(both, (k, v), "KV", strict=True):
                    if not torch.isfinite(x).all():
                        raise OctavoError(
                            f"{side} of layer {layer} is not finite in sample {done}: the model overflows in "
                            f"{bound.dtype}; load it with --dtype bf16 or fp32, or check its weights"
                        )
                    statistics.update(x)

        reading.run(window, observe, torch.arange(offset, offset + length))
        if progress is not None:
            progress(done + 1)

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
    owners = [i if shape.shares is None else shape.shares for i, shape in enumerate(bound.shapes)]
    sides = [{"k": observed[i][0].summary(), "v": observed[i][1].summary()} for i in owners]  # type: ignore[index]
    return Calibration(header, sides)


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


def _offsets(bound: BoundModel, count: int, length: int, seed: int) -> list[int]:
    """Where each window starts: evenly spread over the context, in random order; all at 0 where position matters."""
    last = min(bound.max_context, FARTHEST) - length
    if last <= 0 or not shift_invariant(bound, last):
        return [0] * count
    spread = [round(last * i / max(count - 1, 1)) for i in range(count)]
    random.Random(seed).shuffle(spread)
    return spread


def shift_invariant(bound: BoundModel, offset: int) -> bool:
    """Whether the attention scores of a text stay the same when it is placed `offset` positions later."""
    n = 16
    ids = torch.randint(bound.vocab_size, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    scores: dict[int, list[Tensor]] = {0: [], offset: []}
    for start, seen in scores.items():

        def record(_layer: int, q: Tensor, k: Tensor, _v: Tensor, seen: list[Tensor] = seen) -> None:
            group = q.shape[1] // k.shape[1]
            seen.append(torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, 1)).cpu())

        Reading(bound).run(ids, record, torch.arange(start, start + n))
    return all(
        (moved - placed).norm() <= SCORES_DIFFER * placed.norm()
        for placed, moved in zip(scores[0], scores[offset], strict=True)
    )
