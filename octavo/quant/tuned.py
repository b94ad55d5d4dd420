"""The artefact of `octavo tune`: one file, `kv_formats.safetensors`, beside the calibration.

A JSON header with the format of each layer, the weights that they were chosen for and what was measured; and a tensor
`kl` float32 [layers, 2]: the KL divergence, nats a token, with K or V of that layer alone in 4 bits (NaN where a layer
has no cache of its own).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from octavo import artefact
from octavo.artefact import Artefact
from octavo.errors import OctavoError
from octavo.quant.format import KVFormat, LayerFormats

FILE_NAME = "kv_formats.safetensors"
VERSION = 1


@dataclass(frozen=True)
class Header:
    """Which formats, for which weights, and what they lost on which text."""

    fingerprint: str
    formats: list[str]  # of each layer
    bits: float  # of a value, scales included
    kl: float  # nats a token, measured with these formats
    kl_expected: float  # the sum of what its parts were measured to lose
    text: str
    windows: int
    length: int
    version: int = VERSION


@dataclass(frozen=True)
class Tuned:
    """Formats that were chosen layer by layer."""

    header: Header
    kl: Tensor = field(repr=False)

    @property
    def formats(self) -> LayerFormats:
        return LayerFormats(tuple(map(KVFormat.parse, self.header.formats)))

    def check(self, fingerprint: str | None, layers: int) -> None:
        """Refuse other weights, where these are known, and another number of layers."""
        again = "run `octavo tune` on this model again"
        if fingerprint not in (None, self.header.fingerprint):
            raise OctavoError(
                f"the formats were tuned for other weights ({self.header.fingerprint[:19]}…) than these "
                f"({str(fingerprint)[:19]}…); {again}"
            )
        if len(self.header.formats) != layers:
            raise OctavoError(f"the formats are of {len(self.header.formats)} layers, the model has {layers}; {again}")

    def save(self, directory: Path) -> Path:
        """Write the artefact, whole or not at all, and return its path."""
        return artefact.save(directory / FILE_NAME, self.header, {"kl": self.kl}, "formats")

    @classmethod
    def load(cls, path: Path) -> Tuned:
        """Read the artefact from its file."""
        try:
            file = Artefact.open(path)
            header = file.parse(Header, VERSION)
            for name in header.formats:
                KVFormat.parse(name)
            return cls(header, file.tensors()["kl"])
        except (OctavoError, KeyError) as error:
            raise OctavoError(f"{error}; choose the formats again with `octavo tune`") from None
