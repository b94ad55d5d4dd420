"""Where the windows of a calibration stand.

RoPE is relative, so a window may stand at any position without changing the model's output: windows are spread over the
whole context, densest at its beginning, where most rows of most sessions are. A model for which that is not so (learned
positions, queries scaled by position) is recognized by its scores, and its windows stay at position 0.
"""

import random

import torch
from torch import Tensor

from octavo.engine.reading import Reading
from octavo.models.bind import BoundModel
from octavo.models.changes import close
from octavo.models.hook import itself

NEAR = 128  # positions up to here get as many windows as each doubling beyond
FARTHEST = 1 << 17  # where windows end for a model that names no context of its own
SCORES_DIFFER = 0.05  # relative; bf16 rounding moves scores by about 1 %, a scale or a learned position by more


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

        def record(layer: int, q: Tensor, k: Tensor, v: Tensor, seen: list[Tensor] = seen) -> Tensor:
            keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
            seen.append(torch.einsum("qhd,khd->hqk", q.float(), keys).cpu())
            return itself(layer, q, k, v)

        Reading(bound).run(ids, record, torch.arange(start, start + n))
    return all(close(moved, placed, SCORES_DIFFER) for placed, moved in zip(scores[0], scores[offset], strict=True))
