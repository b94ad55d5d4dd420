"""What a cache format costs in accuracy, on the user's own text.

Every format reads the same windows in lockstep with the baseline, through the same engine parts: perplexity, KL
divergence from the baseline's next-token distribution, and how often the most likely token is the same one. KL is the
sensitive one: perplexity can hide damage that goes both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.attention import attend
from octavo.cache.batch import Batch
from octavo.cache.store import KVCache
from octavo.calibrate import Window
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.quant.format import Granularity, KVFormat

CHUNK = 256  # rows of logits held at a time: a large vocabulary makes them the largest tensor of all


@dataclass(frozen=True)
class Candidate:
    """A way to store the cache, with a name for the table."""

    name: str
    format: KVFormat
    calibration: Calibration | None = None
    granularity: Granularity | None = None
    headroom: float | None = None
    simulate: Callable[[Tensor], Tensor] | None = None  # what K and V go through first, for formats we do not have


@dataclass
class Score:
    """Measured over `tokens` predictions in windows of one length; ± are standard errors over windows."""

    name: str
    tokens: int
    perplexity: float
    perplexity_error: float
    kl: float  # mean, nats, from the baseline
    kl_error: float
    kl_p99: float
    kl_max: float
    agreement: float  # share of positions with the baseline's most likely token
    saturated: float  # share of K and V values outside the codec's range
    kl_by_position: list[float] = field(repr=False)  # mean over windows, [length − 1]


def compare(
    model: Model,
    baseline: Candidate,
    candidates: Sequence[Candidate],
    windows: Sequence[Sequence[int]],
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Scores of the baseline and of each candidate, in that order, over `windows` of token ids of one length."""
    runs = [_Run(model, candidate, len(windows[0])) for candidate in (baseline, *candidates)]
    for done, window in enumerate(windows):
        for run in runs:
            run.start(window)
        for start in range(0, len(window) - 1, CHUNK):
            rows = min(CHUNK, len(window) - 1 - start)
            targets = torch.tensor(window[start + 1 : start + rows + 1])
            reference = runs[0].advance(rows)
            for run in runs:
                run.take(reference, reference if run is runs[0] else run.advance(rows), targets)
        if progress is not None:
            progress(done + 1)
    return [run.score() for run in runs]


class _Run:
    """One candidate's cache and what was measured on it."""

    def __init__(self, model: Model, candidate: Candidate, length: int):
        self.bound, self.candidate = model.bound, candidate
        size = 64
        self.cache = KVCache(
            self.bound.shapes,
            candidate.format,
            -(-length // size),
            None,
            candidate.calibration,
            candidate.granularity,
            candidate.headroom,
        )
        self.loss: list[list[Tensor]] = []  # by window, by chunk: [rows]
        self.kl: list[list[Tensor]] = []
        self.same: list[list[Tensor]] = []

    def start(self, window: Sequence[int]) -> None:
        self.window = Window(window, self.cache.num_blocks)
        for measured in (self.loss, self.kl, self.same):
            measured.append([])

    def advance(self, rows: int) -> Tensor:
        """Log-probabilities [rows, vocabulary] after each of the window's next tokens, float32."""
        batch = Batch.build([(self.window, rows)], self.cache.layout.block_size).on(self.bound.device)
        simulate = self.candidate.simulate

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if simulate is not None:
                k, v = simulate(k), simulate(v)
            return attend(self.bound.layers[layer], self.cache.layers[layer], q, k, v, batch)

        every = torch.arange(rows, device=batch.ids.device)
        logits = self.bound.forward(batch.ids, batch.positions, every, attention)
        self.window.num_cached += rows
        return logits.float().log_softmax(-1).cpu()

    def take(self, reference: Tensor, own: Tensor, targets: Tensor) -> None:
        self.loss[-1].append(-own.gather(-1, targets[:, None])[:, 0])
        self.kl[-1].append((reference.exp() * (reference - own)).sum(-1))
        self.same[-1].append((reference.argmax(-1) == own.argmax(-1)).float())

    def score(self) -> Score:
        loss, kl, same = (torch.stack([torch.cat(w) for w in m]).double() for m in (self.loss, self.kl, self.same))
        stores = self.cache.stores
        perplexity = math.exp(loss.mean())
        return Score(
            name=self.candidate.name,
            tokens=loss.numel(),
            perplexity=perplexity,
            perplexity_error=perplexity * _standard_error(loss),
            kl=kl.mean().item(),
            kl_error=_standard_error(kl),
            kl_p99=kl.flatten().kthvalue(max(1, round(0.99 * kl.numel()))).values.item(),
            kl_max=kl.max().item(),
            agreement=same.mean().item(),
            saturated=sum(s.saturated.item() for s in stores) / max(1, sum(s.written for s in stores)),
            kl_by_position=kl.mean(0).tolist(),
        )


def _standard_error(per_token: Tensor) -> float:
    """Of the mean of [windows, tokens], over windows: tokens of one text are not independent."""
    means = per_token.mean(1)
    return (means.std() / len(means) ** 0.5).item() if len(means) > 1 else math.nan
