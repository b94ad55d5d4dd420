"""The four corners: a model with 16-bit and with 4-bit weights, each with several formats of the cache.

All share one baseline, 16-bit weights with a 16-bit cache; what a cache costs is also told beside the 16-bit cache with
the same weights, for the rounding of weights costs far more and would hide it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from octavo.measure.accuracy.compare import Score, compare
from octavo.measure.candidate import Candidate
from octavo.measure.memory.costs import Cost
from octavo.measure.report.sizes import ROUNDS, TOKENS
from octavo.measure.speed.roofline import Ceiling, ceilings
from octavo.measure.speed.throughput import Speed, measure, prompt_length
from octavo.models.model import Model
from octavo.progress import Count, Share, within

BATCH_SIZES = (1, 8)


@dataclass
class Corner:
    """One kind of weights with one format of the cache: computed, and measured where both models are at hand."""

    cost: Cost
    score: Score | None = None
    speed: list[Speed] = field(default_factory=list)  # by batch size

    def document(self) -> dict[str, Any]:
        """Ready for JSON, without what is only good for a curve."""
        score = self.score.document("kl_by_bin") if self.score is not None else None
        return {**self.cost.fit(), "score": score, "speed": [asdict(row) for row in self.speed]}


def timed(
    model: Model,
    candidates: Sequence[Candidate],
    batch_sizes: Sequence[int],
    context: int,
    rate: float,
    progress: Count,
) -> tuple[list[Ceiling], list[Speed]]:
    """The ceilings at a bandwidth of `rate` bytes a second, and what is measured in sessions of `context` tokens, at
    those batch sizes that it has room for."""
    sizes = [size for size in batch_sizes if prompt_length(size, context, TOKENS) > 0]
    theory = ceilings(model.bound, candidates, sizes, [context], TOKENS, rate)
    return theory, measure(model, candidates, sizes, [context], theory, tokens=TOKENS, rounds=ROUNDS, progress=progress)


def measure_corners(
    model: Model,
    compared: Sequence[Candidate],
    computed: Sequence[Cost],
    windows: Sequence[Sequence[int]],
    context: int,
    rate: float,
    progress: Share,
) -> list[Corner]:
    """The corners that were `computed`, with accuracy and speed of `compared`, which `beside` made in the same order.

    `windows` are read for accuracy; the rest is as for `timed`.
    """
    scores = compare(model, compared, windows, within(progress, "comparing the corners", 0, 0.5))
    _, speed = timed(model, compared, BATCH_SIZES, context, rate, within(progress, "timing the corners", 0.5, 0.5))
    return [
        Corner(cost, score, [row for row in speed if row.kv == candidate.name])
        for cost, candidate, score in zip(computed, compared, scores, strict=True)
    ]
