"""The calibration artefact: one file, `kv_calibration.safetensors`, beside the model or in a work directory.

Tensors `layers.{i}.{k,v}.{min,max,…}` float32 [kv_heads, dim] and a JSON header that says what was measured, on which
weights, and the default granularity and headroom. No scale is ever defaulted: an artefact that is missing, incomplete,
corrupted, or made for other weights or another geometry is an error with its remedy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from octavo import artefact
from octavo.artefact import Artefact
from octavo.errors import OctavoError
from octavo.quant.codec import Static
from octavo.quant.format import DEFAULT_GRANULARITY, DEFAULT_HEADROOM, Codec, Granularity, validate_choice
from octavo.quant.statistics import attention_static, float_static, range_static

FILE_NAME = "kv_calibration.safetensors"
VERSION = 2
SYNTHETIC = "synthetic"  # the fingerprint of `--load-format dummy`

RANGES = {"min", "max"}  # statistics that every calibration has
ATTENTION = {"mean", "std", "reader"}  # those that the static part of token codecs is made from
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Side = dict[str, Tensor]  # statistic → [kv_heads, dim]


@dataclass(frozen=True)
class Header:
    """What the statistics were measured on, and the defaults recorded with them."""

    fingerprint: str
    dataset: str
    samples: Count
    seqlen: Count
    tokens: Count
    positions: tuple[Count, Count]  # first and last position covered
    granularity: Granularity = DEFAULT_GRANULARITY
    headroom: float = DEFAULT_HEADROOM
    rotary: str = ""  # names RoPE's frequencies, which decide what range each channel of K has; "" if not recorded
    version: int = VERSION


@dataclass(frozen=True)
class Calibration:
    """Statistics of every layer: `layers[i] = {"k": …, "v": …}`, each statistic → float32 [kv_heads, dim]."""

    header: Header
    layers: list[dict[str, Side]] = field(repr=False)

    def choosing(self, granularity: Granularity | None = None, headroom: float | None = None) -> Calibration:
        """The same statistics with another default of one or both."""
        granularity = self.header.granularity if granularity is None else granularity
        headroom = self.header.headroom if headroom is None else headroom
        validate_choice(granularity, headroom)
        return replace(self, header=replace(self.header, granularity=granularity, headroom=headroom))

    def static(self, layer: int, side: str, codec: Codec) -> Static:
        """mu and c for `codec` of one side (`"k"` or `"v"`) of one layer. Codecs without a token scale choose by the
        header's granularity and headroom."""
        statistics = self.layers[layer][side]
        if codec.kind == "token":
            if self.ranges_alone:
                raise OctavoError(self.lacks(codec))
            return attention_static(statistics["mean"], statistics["std"], statistics["reader"])
        choose = float_static if codec.kind == "float" else range_static
        return choose(statistics["min"], statistics["max"], self.header.granularity, self.header.headroom)

    @property
    def ranges_alone(self) -> bool:
        """Whether it says how far K and V reach and not what reads them: another project's scales."""
        return any(not side.keys() >= ATTENTION for sides in self.layers for side in sides.values())

    def lacks(self, codec: Codec) -> str:
        """What is missing for a token codec."""
        return (
            f"the calibration ({self.header.dataset}) has ranges of K and V and not the queries that read them, which "
            f"{codec} is made from: run `octavo calibrate`, or serve int8 or fp8"
        )

    def check(self, fingerprint: str, rotary: str, shapes: list[tuple[int, int, int]]) -> None:
        """Refuse other weights, other RoPE settings and other geometry; `shapes` is (kv_heads, k_dim, v_dim) of each
        layer."""
        again = "run `octavo calibrate` on this model again, or serve without calibration with --kv kv8"
        if self.header.fingerprint != fingerprint:
            raise OctavoError(
                f"the calibration was made for other weights ({self.header.fingerprint[:19]}…) "
                f"than these ({fingerprint[:19]}…); {again}"
            )
        if self.header.rotary != rotary:
            raise OctavoError(
                f"the calibration was made under other RoPE settings ({self.header.rotary or 'not recorded'}) than "
                f"these ({rotary}), which depend on the config and may follow --session-len; {again}"
            )
        found = [(*side["k"]["min"].shape, side["v"]["min"].shape[1]) for side in self.layers]
        if found != shapes:
            raise OctavoError(
                f"the calibration covers {len(found)} layers of (KV heads, K dim, V dim) {sorted(set(found))}, "
                f"the model has {len(shapes)} of {sorted(set(shapes))}; {again}"
            )

    def save(self, directory: str | Path) -> Path:
        """Write the artefact, whole or not at all, and return its path."""
        tensors = {
            f"layers.{i}.{side}.{name}": tensor.clone(memory_format=torch.contiguous_format)  # layers may share one
            for i, sides in enumerate(self.layers)
            for side, statistics in sides.items()
            for name, tensor in statistics.items()
        }
        return artefact.save(Path(directory) / FILE_NAME, self.header, tensors, "calibration")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read the artefact from its file or the directory that holds it."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise OctavoError(f"there is no calibration at {path}; make it with `octavo calibrate`")
        try:
            file = Artefact.open(path)
            header = file.parse(Header, VERSION)
            validate_choice(header.granularity, header.headroom)
            return cls(header, _layers(path, file.tensors()))
        except OctavoError as error:
            raise OctavoError(f"{error}; make the calibration again with `octavo calibrate`") from None


def _layers(path: Path, tensors: dict[str, Tensor]) -> list[dict[str, Side]]:
    """The statistics by layer and side; all of a side have one shape, and no range is empty or not finite."""
    layers: dict[int, dict[str, Side]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layers\.([0-9]{1,6})\.([kv])\.([a-z0-9_]+)", name)
        if match is None:
            raise OctavoError(f"{path}: holds {name}, which is no statistic of a layer")
        layers.setdefault(int(match[1]), {}).setdefault(match[2], {})[match[3]] = tensor
    for i in range(len(layers)):
        for side in ("k", "v"):
            ranges = layers.get(i, {}).get(side, {})
            shapes = {(t.dim(), t.shape) for t in ranges.values()}
            if (
                not ranges.keys() >= RANGES
                or len(shapes) > 1
                or ranges["min"].dim() != 2
                or not all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in ranges.values())
                or (ranges["min"] > ranges["max"]).any()
                or (0 < len(ranges.keys() & ATTENTION) < len(ATTENTION))
                or any((ranges[name] < 0).any() for name in ("std", "reader") if name in ranges)
            ):
                raise OctavoError(f"{path}: the {side.upper()} statistics of layer {i} are missing or not valid")
    return [layers[i] for i in range(len(layers))]
