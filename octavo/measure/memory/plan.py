"""How many sessions fit, and how memory grows with them: arithmetic on a model's geometry, nothing is run.

    total = weights + sessions · (states of fixed size, and bytes of all tokens in the cache's format)

Of a model with 16-bit weights, 4-bit ones are computed as `octavo quantize` makes them, in groups of 128, 4.19 bits a
weight (of 64 or 32 where those pack more); embeddings, norms, the head and experts stay as they are. Activations and
the runtime come on top: hold memory back for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.measure.memory.costs import costs, weight_kinds
from octavo.models.geometry import Geometry
from octavo.quant.format import Format


@dataclass(frozen=True)
class Fit:
    """Sessions that fit with one kind of weights and one cache format; bytes."""

    weights: str
    kv: str
    weight_bytes: int
    session_bytes: int
    sessions: int
    spare_bytes: int = 0  # raw pages and states beside those of sessions
    state_bytes: int = 0  # of a session in layers that keep states of fixed size, its snapshots included

    def total(self, sessions: int) -> int:
        return self.weight_bytes + self.spare_bytes + sessions * self.session_bytes


def fits(geometry: Geometry, formats: Sequence[Format], context: int, memory: int) -> list[Fit]:
    """For each kind of weights, each format: sessions of `context` tokens in `memory` bytes."""
    return [
        Fit(cost.weights, cost.format, cost.weight_bytes, cost.session, cost.sessions, cost.spare, cost.states)
        for cost in costs(geometry, formats, context, memory, list(weight_kinds(geometry)))
    ]
