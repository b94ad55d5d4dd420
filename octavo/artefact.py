"""One file of tensors with a JSON header: what calibrations and saved sessions are kept in.

It is a safetensors file. Its metadata has three entries: `octavo`, the header as JSON; `checksums`, the SHA-256 of each
tensor; and `sha256`, of those two together. Nothing of a file is used before its checksum was compared, and no field of
a header before its type was checked: a file may be incomplete, corrupted, or made to do harm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import OctavoError

LARGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself
PART = ".part"  # the end of the name of what is not complete yet

T = TypeVar("T")


class Damaged(OctavoError):
    """A file is incomplete, corrupted, or of another kind."""


@dataclass(frozen=True)
class Artefact:
    """A file whose header was read and compared with its checksum."""

    path: Path
    header: str = field(repr=False)  # JSON
    checksums: dict[str, str] = field(repr=False)  # of each tensor

    @classmethod
    def open(cls, path: Path) -> Artefact:
        """Read the header. Raises Damaged where it is not what was written, OctavoError where it cannot be read."""
        if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would wait for somebody to write to it
            raise OctavoError(f"{path}: not a regular file")
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                text = file.read(size) if size <= LARGEST_HEADER else b""
        except (OSError, ValueError) as error:  # a name with a zero byte
            raise OctavoError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        try:
            metadata = json.loads(text)["__metadata__"]
            header = metadata["octavo"]
            if "sha256" not in metadata:
                raise OctavoError(f"{path}: written by an older version of Octavo, without checksums")
            checksums, digest = metadata["checksums"], metadata["sha256"]
            if _digest(header, checksums) != digest:
                raise Damaged(f"{path}: corrupted: the header differs from its checksum")
            return cls(path, header, _adapter(dict[str, str]).validate_json(checksums, strict=True))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise Damaged(f"{path}: not a file of Octavo's, or its beginning is incomplete or corrupted") from None

    def parse(self, type: type[T], version: int) -> T:
        """The header as a value of `type`, a dataclass; it must be of `version`."""
        try:
            found = json.loads(self.header).get("version")
            if found != version:
                raise OctavoError(f"{self.path}: of version {found!r}, and this Octavo reads version {version}")
            return _adapter(cast(Any, type)).validate_json(self.header, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the header"
            raise Damaged(f"{self.path}: {place} in its header is not valid: {first['msg']}") from None
        except (ValueError, AttributeError, RecursionError):
            raise Damaged(f"{self.path}: its header is not a JSON object") from None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name. Raises Damaged unless they are those that were written, OctavoError where the file
        cannot be read."""
        try:
            tensors = load_file(self.path)
        except OSError as error:
            raise OctavoError(f"{self.path}: {error.strerror or error}") from None
        except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise Damaged(f"{self.path}: incomplete or corrupted ({error})") from None
        if {name: _checksum(tensor) for name, tensor in tensors.items()} != self.checksums:
            raise Damaged(f"{self.path}: corrupted: its tensors differ from their checksums")
        return tensors


def write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], *, private: bool = False) -> int:
    """Write a file and return its size in bytes. `private`: only its owner can read it, from the first byte on."""
    content, checksums = json.dumps(header), json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()})
    metadata = {"octavo": content, "checksums": checksums, "sha256": _digest(content, checksums)}
    with replacing(path, private=private) as part:
        save_file(dict(tensors), part, metadata)
    return path.stat().st_size


def save(path: Path, header: Any, tensors: Mapping[str, Tensor], what: str) -> Path:
    """Write a file with a dataclass for its header, in a directory that is made where there is none; return its path.
    `what` it holds is told where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, asdict(header), tensors)
    except (OSError, OctavoError) as error:
        remedy = "free some space there or name another directory with --work-dir"
        raise OctavoError(f"the {what} could not be written to {path}: {error}; {remedy}") from None
    return path


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A new file that takes the place of `path` once the block has ended, and only if it ended well.

    It is made in a directory that only its owner can enter, so a private one is private from its first byte. Raises
    OctavoError with the system's reason where it cannot be written; the old file is then as it was.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a device would be gone, and a file there in its place
        raise OctavoError(f"{path} cannot be written: not a regular file")
    try:
        with TemporaryDirectory(PART, prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as own:
            probe, part = Path(own, "mode"), Path(own, path.name)
            probe.touch(0o666)  # the process's umask cannot be read without changing it for all threads
            yield part
            part.chmod(0o600 if private else probe.stat().st_mode & 0o777)
            _to_disk(part)
            part.replace(path)
            with suppress(OSError):  # not every file system keeps directories so
                _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise OctavoError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _to_disk(path: Path) -> None:
    """What is written of a file, or which names a directory has, outlives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """One checksum of named tensors: 32 hexadecimal digits."""
    return sha256("".join(f"{name} {_checksum(tensors[name])}\n" for name in sorted(tensors)).encode()).hexdigest()[:32]


@cache
def _adapter(type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type)


def _digest(header: str, checksums: str) -> str:
    return sha256(f"{len(header)} {header}{checksums}".encode(errors="replace")).hexdigest()


def _checksum(tensor: Tensor) -> str:
    digest = sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
