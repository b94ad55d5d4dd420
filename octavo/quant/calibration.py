"""The calibration artefact: one file, `kv_calibration.safetensors`, beside the model or in a work directory.

Tensors `layers.{i}.{k,v}.{min,max,…}` float32 [kv_heads, dim] and a JSON header that says what was measured, on which
weights, and the default granularity and headroom. No scale is ever defaulted: an artefact that is missing, torn, or
made for other weights or another geometry is an error with its remedy.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from octavo.errors import OctavoError
from octavo.quant.codec import Static
from octavo.quant.format import DEFAULT_GRANULARITY, DEFAULT_HEADROOM, Codec, Granularity
from octavo.quant.statistics import attention_static, range_static

FILE_NAME = "kv_calibration.safetensors"
VERSION = 2
SYNTHETIC = "synthetic"  # the fingerprint of `--load-format dummy`

NEEDED = {"min", "max", "mean", "std", "reader"}  # statistics that a static part is made from
Side = dict[str, Tensor]  # statistic → [kv_heads, dim]


@dataclass(frozen=True)
class Header:
    """What the statistics were measured on, and the defaults recorded with them."""

    fingerprint: str
    dataset: str
    samples: int
    seqlen: int
    tokens: int
    positions: tuple[int, int]  # first and last position covered
    granularity: Granularity = DEFAULT_GRANULARITY
    headroom: float = DEFAULT_HEADROOM
    version: int = VERSION


@dataclass(frozen=True)
class Calibration:
    """Statistics of every layer: `layers[i] = {"k": …, "v": …}`, each statistic → float32 [kv_heads, dim]."""

    header: Header
    layers: list[dict[str, Side]] = field(repr=False)

    def static(
        self,
        layer: int,
        side: str,
        codec: Codec,
        granularity: Granularity | None = None,
        headroom: float | None = None,
    ) -> Static:
        """mu and c for `codec` of one side (`"k"` or `"v"`) of one layer. Codecs without a token scale choose by
        granularity and headroom, by default the header's."""
        statistics = self.layers[layer][side]
        if codec.kind == "token":
            return attention_static(statistics["mean"], statistics["std"], statistics["reader"])
        granularity = self.header.granularity if granularity is None else granularity
        headroom = self.header.headroom if headroom is None else headroom
        validate_choice(granularity, headroom)
        return range_static(statistics["min"], statistics["max"], granularity, headroom)

    def check(self, fingerprint: str, shapes: list[tuple[int, int, int]]) -> None:
        """Refuse other weights and other geometry; `shapes` is (kv_heads, k_dim, v_dim) of each layer."""
        again = "run `octavo calibrate` on this model again, or serve without calibration with --kv int8-token"
        if self.header.fingerprint != fingerprint:
            raise OctavoError(
                f"the calibration was made for other weights ({self.header.fingerprint[:19]}…) "
                f"than these ({fingerprint[:19]}…); {again}"
            )
        found = [(*side["k"]["min"].shape, side["v"]["min"].shape[1]) for side in self.layers]
        if found != shapes:
            raise OctavoError(
                f"the calibration covers {len(found)} layers of (KV heads, K dim, V dim) {sorted(set(found))}, "
                f"the model has {len(shapes)} of {sorted(set(shapes))}; {again}"
            )

    def save(self, directory: Path) -> Path:
        """Write the artefact whole or not at all: a temporary file, synced, then renamed over the old one."""
        path = directory / FILE_NAME
        part = path.with_name(f".{FILE_NAME}.{os.getpid()}.part")
        tensors = {
            f"layers.{i}.{side}.{name}": tensor.clone(memory_format=torch.contiguous_format)  # layers may share one
            for i, sides in enumerate(self.layers)
            for side, statistics in sides.items()
            for name, tensor in statistics.items()
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, metadata={"octavo": json.dumps(asdict(self.header))})
            with part.open("rb") as written:
                os.fsync(written.fileno())
            mask = os.umask(0)
            os.umask(mask)
            part.chmod(0o666 & ~mask)  # safetensors makes it readable by its owner alone
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise OctavoError(
                f"the calibration could not be written to {path}: {error}; "
                "free some space there or name another directory with --work-dir"
            ) from None
        finally:
            with suppress(OSError):  # a read-only file system refuses even to remove what is not there
                part.unlink()
        return path

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read the artefact from its file or the directory that holds it."""
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise OctavoError(f"there is no calibration at {path}; make it with `octavo calibrate`")
        try:
            with safe_open(path, framework="pt") as file:
                header = _read_header(path, (file.metadata() or {}).get("octavo"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise OctavoError(f"{path} cannot be read as a calibration ({error}); calibrate again") from None
        return cls(header, _layers(path, tensors))


def validate_choice(granularity: str, headroom: float) -> None:
    if granularity not in get_args(Granularity):
        raise OctavoError(f"granularity {granularity!r} is none of {', '.join(get_args(Granularity))}")
    if not 0.1 <= headroom <= 100:
        raise OctavoError(f"a headroom of {headroom} makes no sense: 1.0 is the calibrated range")


def _read_header(path: Path, text: str | None) -> Header:
    try:
        fields: dict[str, Any] = json.loads(text or "")
        if fields["version"] != VERSION:
            raise OctavoError(
                f"{path} is of calibration version {fields['version']} and this Octavo reads version {VERSION}: "
                "make it again with `octavo calibrate`"
            )
        header = Header(**{**fields, "positions": tuple(fields["positions"]), "headroom": float(fields["headroom"])})
    except (ValueError, TypeError, KeyError):
        raise OctavoError(f"{path} has no Octavo header: it is another kind of file, or damaged") from None
    validate_choice(header.granularity, header.headroom)
    return header


def _layers(path: Path, tensors: dict[str, Tensor]) -> list[dict[str, Side]]:
    """The statistics by layer and side; all of a side have one shape, and no range is empty or not finite."""
    layers: dict[int, dict[str, Side]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(\d+)\.([kv])\.(\w+)", name)
        if match is None:
            raise OctavoError(f"{path} holds {name}, which is no statistic of a layer; calibrate again")
        layers.setdefault(int(match[1]), {}).setdefault(match[2], {})[match[3]] = tensor
    for i in range(len(layers)):
        for side in ("k", "v"):
            ranges = layers.get(i, {}).get(side, {})
            shapes = {(t.dim(), t.shape) for t in ranges.values()}
            if (
                not ranges.keys() >= NEEDED
                or len(shapes) > 1
                or ranges["min"].dim() != 2
                or not all(torch.isfinite(t).all() for t in ranges.values())
                or (ranges["min"] > ranges["max"]).any()
                or (ranges["std"] < 0).any()
                or (ranges["reader"] < 0).any()
            ):
                raise OctavoError(
                    f"{path}: the {side.upper()} statistics of layer {i} are missing or damaged; calibrate again"
                )
    return [layers[i] for i in range(len(layers))]
