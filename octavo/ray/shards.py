"""Input files cut into shards, and the directory of their answers, which can be taken up again where it was left.

    manifest.json         what was asked: the options that shape answers, and the shards
    part-000012.jsonl     the answers of shard 12, in the order of its rows (.parquet for Parquet)
    errors-000012.jsonl   its rows that cannot be answered, and why; no file where there are none

A shard is done once its part is there: it is written last, under another name first. Parts in the order of their names
hold the rows in the order of the input. Every row has `id`, its own or `file:line`, and its file and line.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from octavo.errors import OctavoError, one_line
from octavo.jsonl import own_id

ROWS = 512  # of a shard; many batches, so that the last of them, which grows empty, weighs little
KINDS = (".jsonl", ".parquet")
GOOGLE = "?retry_limit_seconds=30"  # for which it is asked again; by default it is a quarter of an hour
OPTIONS = {"s3": "?allow_delayed_open=true", "gs": GOOGLE, "gcs": GOOGLE}  # the first: a small file is one request


@dataclass(frozen=True)
class Shard:
    """Rows of a file, `start` counted from 0; of JSON lines, where they are: bytes from `offset` on."""

    number: int
    file: str
    start: int
    rows: int
    offset: int = 0


@dataclass(frozen=True)
class Place:
    """A filesystem by its URI, as pyarrow names them: s3://…, gs://…, hdfs://…, fsspec+…://; none for the local one."""

    uri: str = ""

    @property
    def fs(self) -> pa.fs.FileSystem:
        return _filesystem(self.uri)

    @classmethod
    def of(cls, path: str) -> tuple[Place, str]:
        """Where a path is, and what it is there."""
        scheme, found, rest = path.partition("://")
        if not found or scheme == "file":
            return cls(), os.path.abspath(rest or path)
        return cls(f"{scheme}://{rest.partition('/')[0]}{OPTIONS.get(scheme, '')}"), rest


@cache
def _filesystem(uri: str) -> pa.fs.FileSystem:
    return pa.fs.FileSystem.from_uri(uri)[0] if uri else pa.fs.LocalFileSystem()


class Output:
    """The directory of the answers to all files that `pattern` names. Raises OctavoError where it holds other ones."""

    def __init__(self, pattern: str, directory: str, options: dict[str, Any], rows: int = ROWS):
        self.inputs, files = Place.of(pattern)
        self.place, self.directory = Place.of(directory)
        try:
            found = _files(self.inputs.fs, files)
            if not found:
                raise OctavoError(f"--input {pattern} names no file")
            kinds = {Path(file).suffix for file in found}
            if len(kinds) > 1 or not kinds <= set(KINDS):
                raise OctavoError(
                    f"--input {pattern} names {', '.join(sorted(kinds))} files: with --ray it takes .jsonl files, or "
                    ".parquet files"
                )
            self.kind = kinds.pop()
            self.shards = [shard for shard in _cut(self.inputs.fs, found, rows) if shard.rows]
            self.place.fs.create_dir(self.directory, recursive=True)
            self._take_up(options)
        except (OSError, ImportError, ValueError, pa.ArrowException) as error:
            raise OctavoError(f"{pattern} or {directory}: {one_line(error)}") from None

    def left(self) -> list[Shard]:
        """The shards that are not done."""
        there = {info.base_name for info in self.place.fs.get_file_info(pa.fs.FileSelector(self.directory))}
        return [shard for shard in self.shards if self._name("part", shard, self.kind) not in there]

    def write(self, shard: Shard, good: list[dict[str, Any]], bad: list[dict[str, Any]]) -> None:
        if bad:
            self._put(self._name("errors", shard, ".jsonl"), _lines(bad))
        self._put(self._name("part", shard, self.kind), _lines(good) if self.kind == ".jsonl" else _table(good))

    def _take_up(self, options: dict[str, Any]) -> None:
        asked = {"options": options, "shards": [asdict(shard) for shard in self.shards]}
        asked = json.loads(json.dumps(asked, sort_keys=True, default=str))
        path = f"{self.directory}/manifest.json"
        if self.place.fs.get_file_info(path).type == pa.fs.FileType.NotFound:
            self._put("manifest.json", json.dumps(asked).encode())
            return
        with self.place.fs.open_input_stream(path) as file:
            if (other := _differs(file.read(), asked)) is not None:
                raise OctavoError(f"{self.directory} holds answers to {other}: name another --output")

    def _put(self, name: str, content: bytes) -> None:
        part = f"{self.directory}/.{name}.{os.getpid()}.part"
        with self.place.fs.open_output_stream(part) as file:
            file.write(content)
        self.place.fs.move(part, f"{self.directory}/{name}")

    def _name(self, what: str, shard: Shard, kind: str) -> str:
        return f"{what}-{shard.number:06}{kind}"


def read(place: Place, shard: Shard) -> list[tuple[Any, int, bytes | dict[str, Any]]]:
    """The rows of a shard: id, line (from 1), and what it holds: the line's bytes, or columns."""
    name = shard.file.rpartition("/")[2]
    if shard.file.endswith(".parquet"):
        rows = list(enumerate(_parquet_rows(place, shard), shard.start + 1))
        return [(row.get("id", f"{name}:{line}"), line, row) for line, row in rows]
    with io.BufferedReader(cast(Any, place.fs.open_input_file(shard.file))) as file:
        file.seek(shard.offset)
        texts = [file.readline().strip() for _ in range(shard.rows)]
    return [(own_id(text, f"{name}:{line}"), line, text) for line, text in enumerate(texts, shard.start + 1) if text]


def _parquet_rows(place: Place, shard: Shard) -> Iterator[dict[str, Any]]:
    """Only the groups of rows are read that hold some of the shard; what is null is left out."""
    with place.fs.open_input_file(shard.file) as source:
        file, first, skip = pq.ParquetFile(source), 0, 0
        groups: list[int] = []
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < shard.start + shard.rows and first + rows > shard.start:
                skip = shard.start - first if not groups else skip
                groups.append(group)
            first += rows
        for row in file.read_row_groups(groups).slice(skip, shard.rows).to_pylist():
            yield {name: value for name, value in row.items() if value is not None}


def _files(fs: pa.fs.FileSystem, pattern: str) -> list[str]:
    if isinstance(fs, pa.fs.LocalFileSystem):
        return sorted(glob.glob(pattern, recursive=True))
    base = re.split(r"[*?[]", pattern)[0].rpartition("/")[0]
    below = fs.get_file_info(pa.fs.FileSelector(base, recursive=True))
    named = re.compile(glob_translate(pattern.strip("/")))
    return sorted(info.path for info in below if info.is_file and named.fullmatch(info.path.strip("/")))


def _cut(fs: pa.fs.FileSystem, files: list[str], rows: int) -> Iterator[Shard]:
    number = 0
    for path in files:
        if path.endswith(".parquet"):
            with fs.open_input_file(path) as source:
                count = pq.ParquetFile(source).metadata.num_rows
            found = [(start, min(rows, count - start), 0) for start in range(0, count, rows)]
        else:
            found = list(_cut_lines(fs, path, rows))
        for start, held, offset in found:
            yield Shard(number, path, start, held, offset)
            number += 1


def _cut_lines(fs: pa.fs.FileSystem, path: str, rows: int) -> Iterator[tuple[int, int, int]]:
    """(first line, lines, offset in bytes)."""
    with io.BufferedReader(cast(Any, fs.open_input_file(path))) as file:
        start = offset = position = count = 0
        for line in file:
            if count == rows:
                yield start, count, offset
                start, offset, count = start + count, position, 0
            count += 1
            position += len(line)
        yield start, count, offset


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for row in rows)


def _table(rows: list[dict[str, Any]]) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return bytes(out.getvalue())


def _differs(manifest: bytes, asked: dict[str, Any]) -> str | None:
    """In what a directory's manifest differs from what is asked; None if it does not."""
    try:
        before = json.loads(manifest)
        options, shards = before["options"], before["shards"]
        changed = [name for name in {**options, **asked["options"]} if options.get(name) != asked["options"].get(name)]
    except (ValueError, TypeError, KeyError, AttributeError):
        return "something that its manifest.json does not say"
    if changed:
        told = (f"{name} {options.get(name)}, not {asked['options'].get(name)}" for name in changed)
        return f"the same with other options ({'; '.join(told)})"
    return None if shards == asked["shards"] else "other files, or to these before they changed"
