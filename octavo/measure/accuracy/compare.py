"""What a cache format costs in accuracy, on the user's own text.

Every format reads the same windows in lockstep with the baseline, through the same engine parts: perplexity, KL
divergence from the baseline's next-token distribution, and how often the most likely token is the same one. KL is the
sensitive one: perplexity can hide damage that goes both ways. What they come to in an answer: see greedy.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from octavo.engine.reading import LOGIT_ROWS, Reading
from octavo.measure.candidate import Candidate
from octavo.measure.statistics import standard_error
from octavo.models.model import Model
from octavo.progress import Count, silent
from octavo.quant.format import BLOCK

BINS, BIN = 8, BLOCK  # pieces that a window is looked at in, and what a piece's length is a multiple of


@dataclass
class Bin:
    """Predictions of tokens `start` to `stop` − 1 of each window."""

    start: int
    stop: int
    kl: float
    kl_error: float


@dataclass(frozen=True)
class Change:
    """Nats per token from another cache on the same tokens; ± are standard errors over windows, paired."""

    loss: float
    loss_error: float
    kl: float
    kl_error: float


@dataclass
class Score:
    """Measured over `tokens` predictions in windows of one length; ± are standard errors over windows."""

    name: str
    tokens: int
    perplexity: float
    perplexity_error: float
    loss_change: float  # nats per token, from the baseline on the same tokens
    loss_change_error: float  # paired: far smaller than the perplexities' own
    kl: float  # mean, nats, from the baseline
    kl_error: float
    kl_p99: float
    kl_max: float
    agreement: float  # share of positions with the baseline's most likely token
    agreement_error: float
    saturated: float  # share of K and V values outside the codec's range
    cache_alone: Change  # from the first candidate with the same weights: the baseline, unless weights differ
    kl_by_bin: list[Bin] = field(repr=False)

    def document(self, *without: str) -> dict[str, Any]:
        """Its fields, ready for JSON, `without` some."""
        return {name: value for name, value in asdict(self).items() if name not in without}


def compare(
    model: Model,
    candidates: Sequence[Candidate],
    windows: Sequence[Sequence[int]],
    progress: Count = silent,
    enough: Callable[[int], bool] = lambda _: False,
) -> list[Score]:
    """Scores of the candidates, the first of which is the baseline, over `windows` of token ids of one length.
    `progress` is called with the number of tokens read, in all formats, and of all that will be; after each window
    `enough` is asked, with the number of windows read, whether to stop there."""
    return scores(measured(model, candidates, windows, progress, enough))


@dataclass
class Measured:
    """What was measured of one candidate, token by token: float64 [windows, length − 1]."""

    name: str
    first: int  # which candidate is the first with the same weights
    loss: Tensor
    kl: Tensor
    kl_alone: Tensor  # from the first with the same weights
    same: Tensor
    outside: int  # K and V values that the codec cannot say
    written: int

    @classmethod
    def of_all(cls, parts: Sequence[Measured]) -> Measured:
        """Of the windows of several, in their order."""
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("loss", "kl", "kl_alone", "same")
        }
        outside, written = sum(part.outside for part in parts), sum(part.written for part in parts)
        return cls(parts[0].name, parts[0].first, outside=outside, written=written, **tensors)


def measured(
    model: Model,
    candidates: Sequence[Candidate],
    windows: Sequence[Sequence[int]],
    progress: Count = silent,
    enough: Callable[[int], bool] = lambda _: False,
) -> list[Measured]:
    """As `compare`, before it is summed up."""
    runs = [_Run(model, candidate) for candidate in candidates]
    firsts = [next(run for run in runs if run.bound is own.bound) for own in runs]  # with the same weights
    done, total = 0, len(runs) * sum(len(window) - 1 for window in windows)
    for nth, window in enumerate(windows, 1):
        for run in runs:
            run.start(window)
        for targets in torch.tensor(window[1:]).split(LOGIT_ROWS):
            references: dict[_Run, Tensor] = {}  # of the first with each kind of weights
            for run, first in zip(runs, firsts, strict=True):
                own = next(run.logits).log_softmax(-1).cpu()
                references.setdefault(first, own)
                run.take(references[runs[0]], references[first], own, targets)
                done += len(targets)
                progress(done, total)
        for run in runs:
            run.logits.close()
        if enough(nth):
            break
    return [run.measured(runs.index(first)) for run, first in zip(runs, firsts, strict=True)]


def scores(candidates: Sequence[Measured]) -> list[Score]:
    """What the baseline, which is the first, and all others come to."""
    return [_score(one, candidates[0], candidates[one.first]) for one in candidates]


class _Run:
    """One candidate and what was measured on it."""

    def __init__(self, model: Model, candidate: Candidate):
        self.bound, self.candidate = (candidate.model or model).bound, candidate
        self.reading = Reading(self.bound, candidate.format, candidate.calibration, candidate.simulate)
        self.windows: list[list[Tensor]] = []  # each in chunks [4, rows]: loss, KL, KL alone and agreement

    def start(self, window: Sequence[int]) -> None:
        self.logits = self.reading.logits(window[:-1])
        self.windows.append([])

    def take(self, reference: Tensor, first: Tensor, own: Tensor, targets: Tensor) -> None:
        loss, lost = -own.gather(-1, targets[:, None])[:, 0], kl(reference, own)
        alone = lost if first is reference else kl(first, own)
        same = (reference.argmax(-1) == own.argmax(-1)).to(loss.dtype)
        self.windows[-1].append(torch.stack((loss, lost, alone, same)))

    def measured(self, first: int) -> Measured:
        loss, kl, alone, same = torch.stack([torch.cat(chunks, 1) for chunks in self.windows], 1).double()
        outside, written = self.reading.outside, self.reading.written
        return Measured(self.candidate.name, first, loss, kl, alone, same, outside, written)


def _score(own: Measured, baseline: Measured, first: Measured) -> Score:
    perplexity = math.exp(own.loss.mean())
    changed, alone = own.loss - baseline.loss, own.loss - first.loss
    return Score(
        name=own.name,
        tokens=own.loss.numel(),
        perplexity=perplexity,
        perplexity_error=perplexity * _standard_error(own.loss),
        loss_change=changed.mean().item(),
        loss_change_error=_standard_error(changed),
        kl=own.kl.mean().item(),
        kl_error=_standard_error(own.kl),
        kl_p99=own.kl.flatten().kthvalue(max(1, round(0.99 * own.kl.numel()))).values.item(),
        kl_max=own.kl.max().item(),
        agreement=own.same.mean().item(),
        agreement_error=_standard_error(own.same),
        saturated=own.outside / max(1, own.written),
        cache_alone=Change(
            loss=alone.mean().item(),
            loss_error=_standard_error(alone),
            kl=own.kl_alone.mean().item(),
            kl_error=_standard_error(own.kl_alone),
        ),
        kl_by_bin=[
            Bin(start + 1, start + 1 + part.shape[1], part.mean().item(), _standard_error(part))
            for start, part in _bins(own.kl)
        ],
    )


def kl(reference: Tensor, own: Tensor) -> Tensor:
    """Of each row, from log-probabilities [rows, vocabulary]."""
    return (reference.exp() * (reference - own)).sum(-1)


def losses(readings: Sequence[Reading], window: Sequence[int], progress: Callable[[], None]) -> Iterator[float]:
    """Mean KL from the unquantized cache over `window`, nats a token, of each of some readings by one model. `progress`
    is called after each, and after the one that they are compared with, which comes first."""
    first = [logits.log_softmax(-1) for logits in Reading(readings[0].bound).logits(window)]
    progress()
    for reading in readings:
        parts = zip(first, reading.logits(window), strict=True)
        total = sum(kl(expected, logits.log_softmax(-1)).double().sum().item() for expected, logits in parts)
        progress()
        yield total / len(window)


def _bins(per_token: Tensor) -> list[tuple[int, Tensor]]:
    """[windows, tokens] cut into at most BINS pieces of whole blocks, the last of what is left: (start, piece)."""
    width = BIN * -(-per_token.shape[1] // (BIN * BINS))
    starts = range(0, per_token.shape[1], width)
    return list(zip(starts, per_token.split(width, 1), strict=True))


def _standard_error(per_token: Tensor) -> float:
    """Of the mean of [windows, tokens], over windows: tokens of one text are not independent."""
    return standard_error(per_token.mean(1).tolist())
