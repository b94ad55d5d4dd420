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
from octavo.measure.speed.throughput import Speed, measure_all
from octavo.models.model import Model
from octavo.progress import Share

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


def measure_corners(
    model: Model,
    compared: Sequence[Candidate],
    computed: Sequence[Cost],
    windows: Sequence[Sequence[int]],
    context: int,
    rate: float,
    *,
    tokens: int,
    rounds: int,
    progress: Share,
) -> list[Corner]:
    """The corners that were `computed`, with accuracy and speed of `compared`, which `beside` made in the same order.

    `windows` are read for accuracy; sessions of `context` tokens are timed, `tokens` decode steps in each of `rounds`,
    beside a bandwidth of `rate` bytes a second.
    """
    scores = compare(
        model, compared, windows, lambda done, total: progress("comparing the corners", 0.5 * done / total)
    )
    _, speed = measure_all(
        model,
        compared,
        BATCH_SIZES,
        context,
        rate,
        tokens=tokens,
        rounds=rounds,
        progress=lambda done, total: progress("timing the corners", 0.5 + 0.5 * done / total),
    )
    return [
        Corner(cost, score, [row for row in speed if row.kv == candidate.name])
        for cost, candidate, score in zip(computed, compared, scores, strict=True)
    ]
