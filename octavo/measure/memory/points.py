"""Where a model's memory goes, by kind of weights, cache format and number of sessions: measured where there is room.

    total = weights + KV cache + the rest (activations, static parts of the cache, allocator, the process itself)

A point that this machine is too small for is computed (costs.py), without a rest, and says why.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from octavo.measure.memory.costs import Cost
from octavo.measure.memory.process import CannotMeasure, Filled, Request, Source, measure
from octavo.progress import silent


@dataclass(frozen=True)
class Point:
    """One batch size with one kind of weights in one format, in bytes."""

    batch: int
    kind: str
    format: str
    how: Literal["measured", "computed"]
    weights: int
    cache: int
    total: int  # computed: weights and cache alone
    found: Filled | None = None  # what was measured
    reason: str | None = None  # why it was not

    @property
    def rest(self) -> int | None:
        return self.total - self.weights - self.cache if self.found else None

    def document(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None} | {"rest": self.rest}


def points(
    theory: Sequence[Cost],
    batches: Sequence[int],
    context: int,
    sources: Mapping[str, Source] | None = None,
    progress: Callable[[Point], None] = silent,
) -> list[Point]:
    """The table, by batch size and then as in `theory`: measured where its kind of weights has a source and there is
    room, computed elsewhere."""
    found = []
    for batch in batches:
        for cost in theory:
            found.append(_point(cost, batch, context, sources or {}))
            progress(found[-1])
    return found


def _point(cost: Cost, batch: int, context: int, sources: Mapping[str, Source]) -> Point:
    weights, cache = cost.weight_bytes, cost.cache(batch)
    source = sources.get(cost.weights)
    if source is None:
        reason = f"there are no {cost.weights} weights" if sources else "there are no weights: a config alone was given"
    else:
        request = Request(source, cost.kv, batch, context, weights, cache)
        try:
            filled = measure(request)
            return Point(
                batch, cost.weights, cost.format, "measured", filled.weights, filled.cache, filled.peak, filled
            )
        except CannotMeasure as why:
            reason = str(why)
    return Point(batch, cost.weights, cost.format, "computed", weights, cache, weights + cache, reason=reason)


def saved(point: Point, all_points: Sequence[Point]) -> tuple[int, int | None]:
    """Bytes that a point takes less than the first format does at its batch size: of the cache, and in total where
    both are measured."""
    first = next(p for p in all_points if p.batch == point.batch)
    both = point.found is not None and first.found is not None
    return first.cache - point.cache, first.total - point.total if both else None
