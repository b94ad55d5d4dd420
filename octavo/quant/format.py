"""The formats a K or V row can be stored in, as values that parse from and print as a name.

A `Codec` says what one row of one side becomes; a `KVFormat` is one codec for K and one for V. Variation is data: no
class per combination. `LayerFormats` are formats that were chosen layer by layer. The names:

    kv8  k8v4  kv4  k4v8 …  token codecs with edges: what to serve with. Digits are bits of K and V (16 is bf16), and
                            kv8 is short for int8-token+edges
    bf16 fp16 fp32          raw: the codes are the values (the baseline, through the same engine)
    int8                    8 bits, static scale from calibration, no bytes beside the codes
    fp8                     8 bits of float8_e4m3fn, times a static scale where there is a calibration
    int8-token              8 bits and one byte of logarithmic scale per token and head
    int4-token              4 bits and the same byte
    int8-token-unrotated    int4-token-unrotated      without the rotation that token codecs have
    int8/int4-token         K and V named apart
    int8+edges              the edges of the context raw beside the codes (see KVFormat); +edges128 and +edges256 for
                            longer own spans
    tuned                   what `octavo tune` has chosen for a model, layer by layer
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from octavo.errors import OctavoError, did_you_mean

Kind = Literal["raw", "static", "token", "float"]
Granularity = Literal["tensor", "head", "channel"]

# How static scales are chosen from calibrated ranges unless said otherwise: docs/FORMATS.md has the numbers behind it.
DEFAULT_GRANULARITY: Granularity = "channel"
DEFAULT_HEADROOM = 1.4


def validate_choice(granularity: str, headroom: float) -> None:
    if granularity not in get_args(Granularity):
        raise OctavoError(f"granularity {granularity!r} is none of {', '.join(get_args(Granularity))}")
    if not isinstance(headroom, int | float) or not 0.1 <= headroom <= 100:
        raise OctavoError(f"a headroom of {headroom!r} makes no sense: 1.0 is the calibrated range")


@dataclass(frozen=True)
class Codec:
    """What one row `x[D]` of one token and one KV head becomes."""

    kind: Kind
    bits: int
    rotated: bool = False
    dtype: str = "int8"  # torch's name of the stored element; uint8 holds two 4-bit codes

    @property
    def is_raw(self) -> bool:
        return self.kind == "raw"

    @property
    def has_token_scale(self) -> bool:
        """Whether a byte of scale stands beside each row."""
        return self.kind == "token"

    @property
    def needs_calibration(self) -> bool:
        return self.kind == "static"

    def width(self, dim: int) -> int:
        """Stored elements of one row of `dim` values; an odd row of 4-bit codes is padded to a whole byte."""
        return -(-dim // 2) if self.bits == 4 else dim

    def code_bytes(self, dim: int) -> int:
        """Bytes of the codes of one row."""
        return self.width(dim) * max(8, self.bits) // 8

    def row_bytes(self, dim: int) -> int:
        return self.code_bytes(dim) + self.has_token_scale

    def __str__(self) -> str:
        return next(name for name, codec in CODECS.items() if codec == self)


CODECS = {
    "bf16": Codec("raw", 16, dtype="bfloat16"),
    "fp16": Codec("raw", 16, dtype="float16"),
    "fp32": Codec("raw", 32, dtype="float32"),
    "int8": Codec("static", 8),
    "fp8": Codec("float", 8, dtype="uint8"),  # the bits: torch computes little with its own type
    "int8-token": Codec("token", 8, rotated=True),
    "int8-token-unrotated": Codec("token", 8),
    "int4-token": Codec("token", 4, rotated=True, dtype="uint8"),
    "int4-token-unrotated": Codec("token", 4, dtype="uint8"),
}
TUNED = "tuned"  # formats chosen layer by layer, which a model's own artefact holds
NAMES = ("kv8", "k8v4", "kv4")  # what to serve with
ADVISED = (*NAMES, "int8")  # what measurements compare with the model's 16 bits, best first
DIGITS = {"16": "bf16", "8": "int8-token", "4": "int4-token"}  # of short names
BLOCK = 64  # rows of a block of the cache, and of a raw page; the native kernels have no other
SPAN = BLOCK  # rows of a query's own span unless said otherwise
EDGES = {"edges": SPAN, "edges128": 128, "edges256": 256}
RAW_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # by the name of a torch dtype


def dtype_name(dtype: object) -> str:
    """Of a torch dtype: "bfloat16". This module knows no torch."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class KVFormat:
    """How a layer's cache stores K and V.

    With `edges`, a query at position t reads the rows of the first block and of its own span ⌊t/edges⌋·edges … t raw,
    in the model's own type, and the codes of all blocks between. It depends on positions alone.

    >>> KVFormat.parse("k8v4") == KVFormat.parse("int8-token/int4-token+edges")
    True
    >>> str(KVFormat.parse("int8/int8"))
    'int8'
    """

    k: Codec
    v: Codec
    edges: int = 0  # rows of an own span, whole blocks; 0: codes alone are read

    @classmethod
    def raw(cls, dtype: object) -> KVFormat:
        """That keeps K and V as a model of that torch dtype computes them: the baseline."""
        return cls.parse(RAW_NAMES[dtype_name(dtype)])

    @classmethod
    def parse(cls, name: str) -> KVFormat:
        """The format of that name; raises `OctavoError` that lists the names there are."""
        if not isinstance(name, str):
            raise OctavoError(f"a KV format is named by text like 'kv8', not by a value of type {type(name).__name__}")
        base, plus, edges = name.strip().lower().partition("+")
        short = re.fullmatch(r"k(16|8|4)v(16|8|4)|kv(8|4)", base)
        if short and base != "k16v16":
            k, v = (DIGITS[short[3] or digits] for digits in short.groups()[:2])
        else:
            k, slash, v = base.partition("/")
            v = v if slash else k
        try:
            format = cls(CODECS[k], CODECS[v], EDGES[edges] if plus else SPAN if short else 0)
        except KeyError as missing:
            hint = did_you_mean(str(missing.args[0]), [*NAMES, TUNED, *CODECS, *EDGES])
            where = f" in {name!r}" if missing.args[0] != name else ""
            raise OctavoError(
                f"there is no KV format {missing}{where}; {hint}choose "
                f"{', '.join((*NAMES, TUNED, *CODECS))}, K/V pairs such as int8/int4-token, and any of them with "
                "+edges, +edges128 or +edges256"
            ) from None
        if format.edges and not format.takes_calibration:
            raise OctavoError(f"{name!r}: where every row is raw there are no edges; name {format.k} alone")
        return format

    @property
    def needs_calibration(self) -> bool:
        return self.k.needs_calibration or self.v.needs_calibration

    @property
    def calibrates_first(self) -> bool:
        """Whether it is not served without statistics, though a short calibration is enough for it: on models with key
        biases, keys of 4 bits are useless uncalibrated."""
        return not self.needs_calibration and self.k.kind == "token" and self.k.bits == 4

    @property
    def takes_calibration(self) -> bool:
        """Whether calibrated statistics change the codes: raw formats have no static part."""
        return not (self.k.is_raw and self.v.is_raw)

    def token_bytes(self, kv_heads: int, k_dim: int, v_dim: int) -> int:
        """Bytes of one token in one layer."""
        return kv_heads * (self.k.row_bytes(k_dim) + self.v.row_bytes(v_dim))

    def __str__(self) -> str:
        names = {name: digits for digits, name in DIGITS.items()}
        k, v = str(self.k), str(self.v)
        if self.edges and k in names and v in names:
            short = f"kv{names[k]}" if k == v else f"k{names[k]}v{names[v]}"
            return short if self.edges == SPAN else f"{short}+edges{self.edges}"
        edges = "" if not self.edges else "+edges" if self.edges == SPAN else f"+edges{self.edges}"
        return (k if k == v else f"{k}/{v}") + edges


@dataclass(frozen=True)
class LayerFormats:
    """A format for each layer of one model, with one span of edges for all. Asked what a format is asked, it answers
    for all layers."""

    layers: tuple[KVFormat, ...]
    name: str = TUNED

    def __iter__(self) -> Iterator[KVFormat]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def needs_calibration(self) -> bool:
        return any(format.needs_calibration for format in self)

    @property
    def calibrates_first(self) -> bool:
        return not self.needs_calibration and any(format.calibrates_first for format in self)

    @property
    def takes_calibration(self) -> bool:
        return any(format.takes_calibration for format in self)

    def __str__(self) -> str:
        return self.name


Format = KVFormat | LayerFormats


def by_layer(formats: KVFormat | Iterable[KVFormat], layers: int) -> list[KVFormat]:
    """The format of each of so many layers."""
    each = [formats] * layers if isinstance(formats, KVFormat) else list(formats)
    if len(each) != layers:
        raise ValueError(f"{len(each)} formats for {layers} layers")
    return each


def check_name(name: str) -> None:
    """Raise OctavoError for what no format is named."""
    if not is_tuned(name):
        KVFormat.parse(name)


def is_tuned(name: str) -> bool:
    return isinstance(name, str) and name.strip().lower() == TUNED
