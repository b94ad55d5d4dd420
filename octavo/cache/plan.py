"""What the cache of one layer is made from: its shape, its format and the static part of its codes.

Whatever needs to know one of them takes a `LayerPlan`: the cache, the choice of a backend, saved sessions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from octavo.devices import HOST
from octavo.errors import OctavoError
from octavo.quant.calibration import Calibration
from octavo.quant.codec import Static
from octavo.quant.format import Codec, KVFormat, by_layer

Side = Literal["k", "v"]
SIDES: tuple[Side, Side] = ("k", "v")


@dataclass(frozen=True)
class LayerShape:
    """Geometry of the K and V rows of one layer, as its dry trace showed it."""

    kv_heads: int
    k_dim: int
    v_dim: int
    device: torch.device = HOST
    shares: int | None = None  # reads the cache of that earlier layer and writes none of its own
    dtype: torch.dtype = torch.float32  # of the model's own K and V
    exponents: tuple[int, int] = (0, 0)  # powers of two that K and V are divided by where no calibration scales them
    reach: int | None = None  # no query sees more than this many last rows, its own included; None: all

    @property
    def raw_codec(self) -> Codec:
        """That keeps rows as the model computes them."""
        return KVFormat.raw(self.dtype).k

    def dim(self, side: Side) -> int:
        return self.k_dim if side == "k" else self.v_dim

    def power_of_two(self, side: Side) -> Static | None:
        """The static part of one side that is a power of two alone; None if that is 1."""
        exponent = self.exponents[0 if side == "k" else 1]
        like = torch.zeros(self.kv_heads, self.dim(side))
        return Static(like, torch.full_like(like, 2.0**exponent)) if exponent else None

    def token_bytes(self, format: KVFormat) -> int:
        return 0 if self.shares is not None else format.token_bytes(self.kv_heads, self.k_dim, self.v_dim)

    def raw_token_bytes(self, format: KVFormat) -> int:
        """Of a row at an edge; 0 where the format has none."""
        return self.token_bytes(KVFormat(self.raw_codec, self.raw_codec)) if format.edges else 0


@dataclass(frozen=True)
class LayerPlan:
    """One layer's shape, format, and mu and c of K and of V where a calibration gives them."""

    shape: LayerShape
    format: KVFormat
    k: Static | None = None
    v: Static | None = None

    def __post_init__(self) -> None:
        for _, codec, _, static in self.sides:
            if codec.needs_calibration and static is None and self.shape.shares is None:
                raise ValueError(f"the {codec} codec has no scale without a calibration")

    @property
    def sides(self) -> Iterator[tuple[Side, Codec, int, Static | None]]:
        """K, then V: its codec, its dim and its static part."""
        yield "k", self.format.k, self.shape.k_dim, self.k
        yield "v", self.format.v, self.shape.v_dim, self.v


def reaches(shapes: Sequence[LayerShape]) -> list[int | None]:
    """The reaches of the layers that have a cache of their own, the widest first. Layers of one reach are a group with
    block tables of its own: what lies behind its reach is freed."""
    if not shapes:  # no attention: a sequence has a table, and no block is ever read
        return [1]
    found = {shape.reach for shape in shapes if shape.shares is None}
    return sorted(found, key=lambda reach: -float("inf") if reach is None else -reach)


def plan_layers(
    shapes: Sequence[LayerShape],
    formats: KVFormat | Iterable[KVFormat],
    calibration: Calibration | None = None,
) -> list[LayerPlan]:
    """The plans of all layers. `formats` is one for each layer, or one for all. Static formats take mu and c from
    `calibration`, which must have been checked against the model; token formats use it where there is one, else the
    shape's powers of two."""
    each = by_layer(formats, len(shapes))

    def static(layer: int, side: Side, codec: Codec) -> Static | None:
        if codec.is_raw or shapes[layer].shares is not None:
            return None
        if calibration is None:
            return shapes[layer].power_of_two(side) if codec.has_token_scale else None
        return calibration.static(layer, side, codec)

    return [
        LayerPlan(shape, format, static(i, "k", format.k), static(i, "v", format.v))
        for i, (shape, format) in enumerate(zip(shapes, each, strict=True))
    ]


def own_span(formats: Sequence[KVFormat], block_size: int) -> int:
    """The own span of a cache whose layers have these formats, 0 without edges. Raises OctavoError where layers differ
    in it, or where it is no whole blocks."""
    spans = {format.edges for format in formats if format.edges}
    if len(spans) > 1:
        raise OctavoError(f"layers with own spans of {' and '.join(map(str, sorted(spans)))} rows cannot share a cache")
    span = spans.pop() if spans else 0
    if span % block_size:
        raise OctavoError(f"an own span of {span} rows is no whole number of blocks of {block_size}")
    return span
