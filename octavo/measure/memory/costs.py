"""What weights and cache take, by kind of weights and cache format, and how many sessions fit beside the weights:
computed from a model's geometry, nothing is run.

    total = weights + sessions · (states of fixed size, and bytes of all tokens in the cache's format)

What a 16-bit model would take with 4-bit weights is computed for what `octavo quantize` packs in groups of 128, or of
64 or 32 where those pack more, each with a 16-bit scale and a zero; the other weights stay: embeddings, norms, the
head, experts, layers that the groups do not divide. Activations, allocator and the process come on top: they are only
ever measured (points.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.cache.size import CacheSize
from octavo.engine.scheduler import CHUNK_TOKENS
from octavo.errors import OctavoError
from octavo.models.geometry import Geometry
from octavo.quant.format import Format, KVFormat, by_layer

INT4 = "int4"


@dataclass(frozen=True)
class Cost:
    """What a kind of weights and a cache format cost in theory."""

    weights: str  # their kind
    weight_bytes: int
    kv: Format
    token: int  # bytes of one token in all layers
    session: int  # bytes of a session filled to the context; its last block counts whole
    static: int  # bytes of the calibrated static part, once, whatever the number of sessions
    sessions: int  # that fit beside the weights
    spare: int = 0  # bytes of raw pages and states that are there whatever the number of sessions
    states: int = 0  # bytes of a session in layers that keep states of fixed size, its snapshots included

    @property
    def format(self) -> str:
        return str(self.kv)

    def cache(self, sessions: int) -> int:
        return sessions * self.session + self.spare

    def total(self, sessions: int) -> int:
        return self.weight_bytes + self.cache(sessions)

    def document(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {"format": self.format} | {name: value for name, value in vars(self).items() if name != "kv"}

    def fit(self) -> dict[str, Any]:
        """How many sessions fit, ready for JSON."""
        return {"weights": self.weights, "kv": self.format, "weight_bytes": self.weight_bytes,
                "session_bytes": self.session, "sessions": self.sessions, "spare_bytes": self.spare,
                "state_bytes": self.states}  # fmt: skip


def int4_bits(group: int) -> float:
    """Of one weight in memory, its share of a group's scale and zero included."""
    return 4 + 16 / group + 8 / group


def weight_kinds(geometry: Geometry) -> dict[str, int]:
    """Bytes of all weights by their kind: in the model's own type, and with linear layers in 4 bits if it has any."""
    size = geometry.dtype.itemsize
    plain = geometry.weights - geometry.packed_bytes + size * geometry.packed
    kinds = {str(KVFormat.raw(geometry.dtype)): plain}
    if geometry.linear:
        four = plain - size * geometry.linear + round(geometry.linear * int4_bits(geometry.group) / 8)
        kinds[INT4] = geometry.weights if geometry.packed else four
    return kinds


def own_kind(geometry: Geometry) -> str:
    """The kind of the weights that the model has."""
    return INT4 if geometry.packed else str(KVFormat.raw(geometry.dtype))


def costs(
    geometry: Geometry, formats: Sequence[Format], context: int, memory: int, kinds: Sequence[str] | None = None
) -> list[Cost]:
    """For each kind of weights (the model's own if None), what each format costs, and how many sessions of `context`
    tokens `memory` bytes hold beside the weights."""
    if not 2 <= context <= geometry.max_context:
        raise OctavoError(f"a context of {context} tokens: the model's own reaches from 2 to {geometry.max_context}")
    weights, found = weight_kinds(geometry), []
    for kind in kinds if kinds is not None else [own_kind(geometry)]:
        for format in formats:
            size = CacheSize.of(geometry.shapes, format, step=CHUNK_TOKENS, states=geometry.states)
            session, spare = size.session(context), size.cache(0, 0)
            fit = max(0, (memory - weights[kind] - spare) // session)
            static = _static(geometry, format)
            found.append(
                Cost(kind, weights[kind], format, size.token, session, static, fit, spare, size.session_states)
            )
    return found


def _static(geometry: Geometry, format: Format) -> int:
    """mu, c and 1/c in float32, of the sides that have them once the format is calibrated."""
    layers = zip(geometry.shapes, by_layer(format, len(geometry.shapes)), strict=True)
    sides = [(s, codec, dim) for s, own in layers for codec, dim in ((own.k, s.k_dim), (own.v, s.v_dim))]
    return sum(12 * s.kv_heads * dim for s, codec, dim in sides if s.shares is None and not codec.is_raw)
