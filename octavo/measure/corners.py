"""The four corners: a model with 16-bit and with 4-bit weights, each with several formats of the cache.

All share one baseline, 16-bit weights with a 16-bit cache; what a cache costs is also told beside the 16-bit cache with
the same weights, for the rounding of weights costs far more and would hide it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from octavo.errors import OctavoError
from octavo.measure.accuracy import Candidate, Score, compare
from octavo.measure.ceiling import ceilings
from octavo.measure.memory import INT4
from octavo.measure.plan import Fit
from octavo.measure.speed import Speed, measure, prompt_length
from octavo.models.model import Model
from octavo.quant.calibration import Calibration

BATCH_SIZES = (1, 8)


@dataclass
class Corner:
    """One kind of weights with one format of the cache: computed, and measured where both models are at hand."""

    fit: Fit
    score: Score | None = None
    speed: list[Speed] = field(default_factory=list)  # by batch size

    def document(self) -> dict[str, Any]:
        """Ready for JSON, without what is only good for a curve."""
        score = asdict(self.score) if self.score is not None else None
        if score is not None:
            del score["kl_by_position"], score["kl_by_bin"]
        return {**asdict(self.fit), "score": score, "speed": [asdict(row) for row in self.speed]}


def check_pair(sixteen: Model, four: Model) -> None:
    """Raise OctavoError unless these are one model with 16-bit and with 4-bit weights, computing in one type."""
    if four.weight_kind != INT4:
        raise OctavoError(
            f"--baseline goes with a MODEL of 4-bit weights, and those of {four.name} are {four.weight_kind}: name the "
            "4-bit model as MODEL, the 16-bit one as --baseline"
        )
    if sixteen.weight_kind == INT4:
        raise OctavoError(f"--baseline {sixteen.name}: its weights are int4 like MODEL's; name the 16-bit model")
    if sixteen.bound.shapes != four.bound.shapes or sixteen.tokenizer.get_vocab() != four.tokenizer.get_vocab():
        raise OctavoError(
            f"--baseline {sixteen.name} is another model than {four.name}: their layers or vocabularies differ"
        )
    if sixteen.bound.dtype != four.bound.dtype:
        types = f"{sixteen.name} computes in {sixteen.bound.raw_format}, {four.name} in {four.bound.raw_format}"
        raise OctavoError(f"{types}: load both in one dtype, or their caches differ too")


def beside(
    sixteen: Model, four: Model, own: Sequence[Candidate], calibration: Calibration | None = None
) -> list[Candidate]:
    """Each format with the weights of both models: 16-bit ones first, with `calibration` or the one found of theirs.

    Names are like `W4 int8`: bits of the weights, format of the cache. Raises OctavoError for models that are no pair,
    and where a format needs a calibration that the 16-bit model has not.
    """
    check_pair(sixteen, four)
    others = [replace(c, model=sixteen, calibration=sixteen.calibration(calibration, c.format)) for c in own]
    for calibrated, bare, model in ((own, others, sixteen), (others, own, four)):
        lacking = [b.name for a, b in zip(calibrated, bare, strict=True) if a.calibration and not b.calibration]
        if lacking:
            warnings.warn(
                f"{', '.join(lacking)}: {model.name} has no calibration and the other model has; to compare like with "
                f"like run `octavo calibrate {model.name}`",
                stacklevel=2,
            )
    return [
        replace(c, name=f"W{''.join(filter(str.isdigit, model.weight_kind))} {c.name}")
        for model, candidates in ((sixteen, others), (four, own))
        for c in candidates
    ]


def measure_corners(
    model: Model,
    compared: Sequence[Candidate],
    fits: Sequence[Fit],
    windows: Sequence[Sequence[int]],
    context: int,
    rate: float,
    *,
    tokens: int,
    rounds: int,
    progress: Callable[[str, float], None],
) -> list[Corner]:
    """The corners of `fits` with the accuracy and speed of `compared`, which `beside` made in the same order.

    `windows` are read for accuracy; sessions of `context` tokens are timed, `tokens` decode steps in each of `rounds`,
    beside a bandwidth of `rate` bytes a second.
    """
    first, *others = compared
    scores = compare(
        model, first, others, windows, lambda done: progress("comparing the corners", 0.5 * done / len(windows))
    )
    sizes = [size for size in BATCH_SIZES if prompt_length(size, context, tokens) > 0]
    theory = ceilings(model.bound, compared, sizes, [context], tokens, rate)
    runs = len(theory) * rounds
    speed = measure(
        model,
        compared,
        sizes,
        [context],
        theory,
        tokens=tokens,
        rounds=rounds,
        progress=lambda done: progress("timing the corners", 0.5 + 0.5 * done / runs),
    )
    return [
        Corner(fit, score, [row for row in speed if row.kv == candidate.name])
        for fit, candidate, score in zip(fits, compared, scores, strict=True)
    ]
