"""Artefact files: what is read is what was written; everything else is one clear error, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import artefact
from octavo.artefact import Artefact, Damaged
from octavo.cache import session
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.session import Identity, SavedSession
from octavo.cache.store import KVCache
from octavo.errors import OctavoError
from octavo.quant.calibration import FILE_NAME, Calibration, Header
from octavo.quant.format import KVFormat
from octavo.quant.statistics import Statistics

FINGERPRINT = "sha256:1"
SHAPE = LayerShape(1, 4, 4)
IDENTITY = Identity(FINGERPRINT, "float32", [[1, 4, 4]], ["int8-token"], "0")

Make = Callable[[Path], Callable[[], object]]


def a_session(path: Path) -> Callable[[], object]:
    """A small session at `path`; returns how it is taken into use."""
    cache = KVCache(plan_layers([SHAPE], KVFormat.parse("int8-token")), 1, Layout(8))
    codes = {}
    for side in "kv":
        codes[f"layers.0.{side}.codes"] = torch.arange(32, dtype=torch.int8).view(1, 8, 4)
        codes[f"layers.0.{side}.scales"] = torch.arange(8, dtype=torch.uint8).view(1, 8)
    session.save(path, range(9), codes, IDENTITY)

    def use() -> object:
        saved = SavedSession.open(path)
        saved.check(IDENTITY, 9)
        return saved.header, {name: rows.tolist() for name, rows in saved.codes(cache).items()}

    return use


def a_calibration(path: Path) -> Callable[[], object]:
    """A small calibration that is moved to `path`; returns how it is taken into use."""
    statistics = Statistics(1, 4)
    statistics.update(torch.arange(32.0).view(8, 1, 4))
    made = Calibration(
        Header(FINGERPRINT, "ptb", 1, 8, 8, (0, 7)), [{"k": statistics.summary(), "v": statistics.summary()}]
    )
    made.save(path.parent).rename(path)

    def use() -> object:
        loaded = Calibration.load(path)
        loaded.check(FINGERPRINT, [(1, 4, 4)])
        return loaded

    return use


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of files are written; none of them has to outlive a crash of the machine."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


KINDS = pytest.mark.parametrize("make", [a_session, a_calibration])
# make test takes some of the cases, make test-slow all of them.
SOME_OR_ALL = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])


def refused(use: Callable[[], object], path: Path) -> bool:
    """Whether the file is refused by one line that names it. Any other exception is a fault."""
    try:
        use()
    except OctavoError as error:
        message = str(error)
    else:
        return False
    assert str(path) in message
    assert "\n" not in message
    return True


@KINDS
@SOME_OR_ALL
def test_every_flipped_byte_is_noticed(make: Make, every: bool, tmp_path: Path, slowly: Callable[[int], int]) -> None:
    path = tmp_path / "file"
    use = make(path)
    whole = path.read_bytes()
    accepted = []
    for at in range(0, len(whole), len(whole) // slowly(len(whole)) if every else 11):
        data = bytearray(whole)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        if not refused(use, path):
            accepted.append(at)
    assert accepted == []


@KINDS
def test_a_file_is_refused_wherever_it_ends(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "file"
    use = make(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 23), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert refused(use, path), length
    path.write_bytes(whole + b"\0")
    assert refused(use, path)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def mutated(document: Any, draw: random.Random, keep: set[str]) -> Any:
    """A copy in which one value is of another type, out of its bounds, or missing. Not in parts named in `keep`."""
    copy = json.loads(json.dumps(document))
    path = draw.choice([path for path in places(copy) if path and path[0] not in keep])
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    value = holder[path[-1]]
    nested: Any = 0
    for _ in range(draw.choice([3, 60])):
        nested = [nested]
    choices: list[Any] = [None, True, {"a": 1}, nested, -1, 1 << 70, 0.5]
    if not isinstance(value, str):
        choices.append("x")
    if isinstance(holder, dict) and draw.random() < 0.2:
        del holder[path[-1]]
    else:
        holder[path[-1]] = draw.choice([c for c in choices if c != value])
    return copy


@KINDS
@SOME_OR_ALL
def test_headers_made_to_do_harm_are_refused(
    make: Make, every: bool, tmp_path: Path, slowly: Callable[[int], int]
) -> None:
    """Their checksums are right: somebody wrote the file so."""
    path = tmp_path / "file"
    use = make(path)
    header, tensors = json.loads(Artefact.open(path).header), load_file(path)
    draw = random.Random(0)
    for _ in range(slowly(1000) if every else 100):
        # These have defaults, or are what their owner likes.
        changed = mutated(header, draw, {"about", "granularity", "headroom"})
        artefact.write(path, changed, tensors)
        assert refused(use, path), changed


@KINDS
@SOME_OR_ALL
def test_tables_of_tensors_made_to_do_harm_are_refused(
    make: Make, every: bool, tmp_path: Path, slowly: Callable[[int], int]
) -> None:
    """What safetensors itself reads: types, shapes and offsets."""
    path = tmp_path / "file"
    use = make(path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    table, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    draw = random.Random(1)
    for _ in range(slowly(1000) if every else 100):
        changed = json.dumps(mutated(table, draw, {"__metadata__"})).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + data)
        assert refused(use, path), changed


@pytest.mark.parametrize("content", [b"", b"hello", bytes(1000), b"\xff" * 64, b"PK\x03\x04" + b"x" * 500])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(Damaged, match="not a file of Octavo's"):
        Artefact.open(tmp_path / "file")


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    text = b"[" * 1_000_000
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(Damaged):
        Artefact.open(tmp_path / "file")


def test_safetensors_of_others_and_of_older_versions_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(Damaged, match="not a file of Octavo's"):
        Artefact.open(path)
    save_file({"weight": torch.zeros(2)}, path, metadata={"octavo": "{}"})
    with pytest.raises(OctavoError, match="older version of Octavo"):
        Artefact.open(path)


@pytest.mark.parametrize("private", [True, False])
def test_a_private_file_is_private_from_its_first_byte(
    private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is written, and after; another keeps to the umask, which is never changed: it is all threads'."""
    seen = []

    def watched(tensors: Any, part: Path, metadata: Any) -> None:
        save_file(tensors, part, metadata)
        seen.append(stat.S_IMODE(part.parent.stat().st_mode))

    def forbidden(_: int) -> int:
        raise AssertionError("the umask was changed")

    monkeypatch.setattr(artefact, "save_file", watched)
    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", forbidden)
    try:
        artefact.write(tmp_path / "file", {}, {"x": torch.zeros(1)}, private=private)
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert seen == [0o700]
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == (0o600 if private else 0o640)


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: seen.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))
    )
    artefact.write(path, {}, {"x": torch.zeros(1)})
    assert seen == [(False, False), (True, True)]


def test_what_is_no_file_is_not_written_over(tmp_path: Path) -> None:
    """A device would be gone for all programs."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OctavoError, match=f"{path} cannot be written: not a regular file"):
            artefact.write(path, {}, {"x": torch.zeros(1)})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save_file", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / FILE_NAME
    artefact.write(path, {"old": 1}, {"x": torch.zeros(1)})
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(artefact if where == "save_file" else os, where, fail)
    with pytest.raises((OctavoError, KeyboardInterrupt)) as caught:
        artefact.write(path, {"new": 1}, {"x": torch.zeros(1)})
    assert isinstance(caught.value, KeyboardInterrupt) or str(caught.value).endswith("No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]
    assert path.read_bytes() == before
