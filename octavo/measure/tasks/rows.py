"""The table of tasks: scores, paired differences, and whether the model solves a task at all.

All formats answer the same items, so the error of their difference is that of the items' differences: far smaller than
the errors of the two scores. A model that guesses shows no difference whatever its cache does, so each row says how its
score stands to guessing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean as mean

from octavo.errors import OctavoError
from octavo.measure.statistics import standard_error
from octavo.measure.tasks import Benchmark
from octavo.measure.tasks.results import Result

SURE = 2  # standard errors that a score must be above guessing


@dataclass
class Row:
    """A benchmark in all formats; scores and differences are percentages, ± their standard errors."""

    name: str
    kind: str
    metric: str
    higher_is_better: bool
    items: int
    scores: dict[str, float]  # by format, the baseline first
    errors: dict[str, float]
    differences: dict[str, float]  # from the baseline, by the other formats
    difference_errors: dict[str, float]  # paired
    guess: float | None  # the score of guessing; None where it is not known, or nothing is right or wrong

    @property
    def solved(self) -> bool | None:
        """Whether the baseline is surely better than guessing."""
        if self.guess is None:
            return None
        base = next(iter(self.scores))
        return self.scores[base] - self.guess > SURE * (self.errors[base] if math.isfinite(self.errors[base]) else 0)


def row(benchmark: Benchmark, names: Sequence[str], results: dict[str, list[Result]]) -> Row:
    """`results` are those of the benchmark's subtasks, by format; what all formats were asked is compared."""
    values: dict[str, list[float]] = {}
    prompts: dict[str, list[str]] = {}
    by_subtask = zip(*(results[name] for name in names), strict=True)
    common = [min(len(result.items) for result in formats) for formats in by_subtask]
    for name in names:
        items = [item for result, count in zip(results[name], common, strict=True) for item in result.items[:count]]
        values[name] = [100 * item[benchmark.metric] for item in items]
        prompts[name] = [item["prompt"] for item in items]
    base, *others = names
    if any(prompts[name] != prompts[base] for name in others):
        raise OctavoError(
            f"the formats were asked other questions in {benchmark.name}: remove its files from --results"
        )
    whole = len(common) == max(1, len(benchmark.subsets))
    changes = {name: [own - old for own, old in zip(values[name], values[base], strict=True)] for name in others}
    return Row(
        name=benchmark.name if whole else f"{benchmark.name} ({len(common)} of {len(benchmark.subsets)})",
        kind=benchmark.kind,
        metric=benchmark.label,
        higher_is_better=benchmark.higher_is_better,
        items=len(values[base]),
        scores={name: mean(values[name]) for name in names},
        errors={name: standard_error(values[name]) for name in names},
        differences={name: mean(changes[name]) for name in others},
        difference_errors={name: standard_error(changes[name]) for name in others},
        guess=benchmark.guess if whole else None,
    )
