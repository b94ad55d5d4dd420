"""Where texts come from: a file, a set known by name in a local directory, or the same set on the Hub.

A text is a sequence of documents; a running text (PTB, WikiText-2, a .txt file) is a single one. Files are read when
iterated, sets on the Hub are streamed, so that nobody downloads 300 GB of C4 to look at a thousand documents of it.
"""

import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal

from octavo.errors import OctavoError, install, one_line
from octavo.models.locate import PROSE

Split = Literal["calibration", "test"]

OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}
SUFFIX = re.compile(r"\.(txt|jsonl|json)(\.gz|\.xz)?$", re.IGNORECASE)
SPLIT_OF_WORD = {"train": "train", "test": "test", **dict.fromkeys(("valid", "validation", "val", "dev"), "valid")}
# Which files serve which purpose, best first; "" has no split in its name. What others calibrate on is never taken for
# a test, nor the other way round, unless the user names that very file.
PREFERENCE: dict[Split, tuple[str, ...]] = {"calibration": ("train", "", "valid"), "test": ("test", "valid", "")}


@dataclass(frozen=True)
class Source:
    """A set on the Hub: the arguments of `load_dataset` by purpose, and how its rows join if it is a running text."""

    repository: str
    arguments: dict[Split, dict[str, Any]]
    join: Callable[[Iterable[str]], str] | None = None
    needs: tuple[str, ...] = ("datasets",)


def _file(name: str, split: str, **more: Any) -> dict[str, Any]:
    return {"data_files": {split: name}, "split": split, **more}


# PTB's repository holds a script, which datasets 4 refuses, and the Hub's Parquet copy of it no configs: name the file.
_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet"
_WIKITEXT = "wikitext-2-raw-v1"
SOURCES = {
    "ptb": Source(
        "ptb-text-only/ptb_text_only",
        {
            "calibration": _file(_PTB.format("train"), "train", path="parquet"),
            "test": _file(_PTB.format("test"), "test", path="parquet"),
        },
        lambda rows: " ".join(row.strip() for row in rows),
    ),
    "c4": Source(  # one shard of 1024: the one that everybody calibrates on
        "allenai/c4",
        {
            "calibration": _file("en/c4-train.00000-of-01024.json.gz", "train"),
            "test": _file("en/c4-validation.00000-of-00008.json.gz", "validation"),
        },
    ),
    "wikitext2": Source(
        "Salesforce/wikitext",
        {"calibration": {"name": _WIKITEXT, "split": "train"}, "test": {"name": _WIKITEXT, "split": "test"}},
        lambda rows: "\n\n".join(row if row.strip() else "" for row in rows),  # as in published perplexities
    ),
    "pileval": Source(  # has no other split
        "mit-han-lab/pile-val-backup",
        {"calibration": {"split": "validation"}, "test": {"split": "validation"}},
        needs=("datasets", "zstandard"),
    ),
}


@dataclass(frozen=True)
class Texts:
    """Documents, read anew by each iteration. Reading raises OctavoError where the source is damaged or empty."""

    name: str  # what is really read
    read: Callable[[], Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        empty = True
        for document in self.read():
            if document.strip():
                empty = False
                yield document
        if empty:
            raise OctavoError(f"{self.name} holds no text: name another file or set")


def load_texts(name: str | None, data_dir: Path | None = None, split: Split = "calibration") -> Texts:
    """The texts that `name` stands for: one of `SOURCES`, or a .txt, .jsonl or .json file (also .gz, .xz); the bundled
    English prose if None.

    A set is looked for in `data_dir` (`ptb.train.txt`, `c4_sample.jsonl`, …) and then on the Hub; a file also in
    `data_dir`. A .txt file is one running text. JSON holds documents, in `text` or the only field that is a string.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise OctavoError(f"--data-dir {data_dir} is not a directory: name the one that holds the texts")
    name = str(PROSE) if name is None else name
    if source := SOURCES.get(name.lower()):
        return _named(name.lower(), source, data_dir, split)
    path = Path(name).expanduser()
    if not path.exists() and data_dir is not None and (data_dir / name).exists():
        path = data_dir / name
    known = f"the sets known by name are {', '.join(SOURCES)}{_listing(data_dir)}"
    if path.is_dir():
        raise OctavoError(f"{name} is a directory: name a .txt, .jsonl or .json file in it, or a set; {known}")
    if not path.exists():
        raise OctavoError(f"there is no file and no set of texts named {name}; {known}")
    if not SUFFIX.search(path.name):
        raise OctavoError(f"{name} is not a .txt, .jsonl or .json file, nor one of these as .gz or .xz: convert it")
    return Texts(path.name, lambda: _rows(path, whole=True))


def _named(name: str, source: Source, data_dir: Path | None, split: Split) -> Texts:
    def texts(title: str, rows: Callable[[], Iterable[str]]) -> Texts:
        join = source.join
        return Texts(title, rows if join is None else lambda: [join(rows())])

    if file := _local_file(name, data_dir, split):
        return texts(f"{name} ({file.name})", lambda: _rows(file, whole=source.join is None))
    arguments = {"path": source.repository, **source.arguments[split]}
    title = f"{name} ({source.repository}, {arguments['split']})"
    expected = f"{name}.{PREFERENCE[split][0]}.{'jsonl' if source.join is None else 'txt'}"
    remedy = f"put {expected} into a directory and name that with --data-dir{_listing(data_dir)}"
    missing = [module for module in source.needs if find_spec(module) is None]
    if missing:
        raise OctavoError(
            f"{name} comes from the Hub, which takes {' and '.join(missing)} ({install('datasets')}); or {remedy}"
        )
    return texts(title, _hub_rows(title, arguments, f"check the network, or {remedy}"))


def _local_file(name: str, data_dir: Path | None, split: Split) -> Path | None:
    """The file in `data_dir` that suits `split` of a named set best, if any does."""

    def rank(file: Path) -> int:
        words = {SPLIT_OF_WORD[word] for word in re.split("[^a-z]+", file.name.lower()) if word in SPLIT_OF_WORD}
        kind = words.pop() if len(words) == 1 else ""
        return PREFERENCE[split].index(kind) if kind in PREFERENCE[split] else -1

    files = [f for f in _text_files(data_dir) if re.sub("[-_]", "", f.name.lower()).startswith(name) and rank(f) >= 0]
    return min(files, key=lambda file: (rank(file), file.name), default=None)


def _text_files(data_dir: Path | None) -> list[Path]:
    return [f for f in sorted(data_dir.iterdir()) if SUFFIX.search(f.name) and f.is_file()] if data_dir else []


def _listing(data_dir: Path | None) -> str:
    if data_dir is None:
        return ""
    names = [file.name for file in _text_files(data_dir)]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"; {data_dir} holds {', '.join(names[:10]) or 'no text file'}{more}"


def _hub_rows(title: str, arguments: dict[str, Any], remedy: str) -> Callable[[], Iterator[str]]:
    import datasets

    def failed(error: Exception) -> OctavoError:
        return OctavoError(f"{title} cannot be read from the Hub: {remedy} [{one_line(error)}]")

    try:
        loaded: Iterable[dict[str, Any]] = datasets.load_dataset(**arguments, streaming=True)
    except Exception as error:  # the many ways a network fails
        raise failed(error) from error

    def rows() -> Iterator[str]:
        stream = enumerate(loaded, 1)
        while True:
            try:
                number, row = next(stream, (0, None))
            except Exception as error:
                raise failed(error) from error
            if row is None:
                return
            yield _document(row, f"{title}, row {number}")

    return rows


def _rows(path: Path, whole: bool) -> Iterator[str]:
    """Documents of a file. A .txt file is one if `whole`, else its lines are."""
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig") as file:
            kind = next(part for part in reversed(path.name.lower().split(".")) if part in ("txt", "jsonl", "json"))
            if kind == "txt":
                yield from [file.read()] if whole else file
            elif kind == "json" and not _is_object(file.readline()):
                file.seek(0)
                yield from _json_documents(file.read(), path.name)
            else:  # many a .json file holds an object on each line too
                file.seek(0)
                yield from _json_lines(file, path.name)
    except UnicodeDecodeError as error:
        raise OctavoError(f"{path} is not UTF-8 text (see byte {error.start}): convert it to UTF-8") from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise OctavoError(
            f"{path} is incomplete or corrupted ({one_line(error)}): fetch or compress it again"
        ) from None
    except OSError as error:
        raise OctavoError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _json_lines(lines: Iterable[str], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise OctavoError(f"{name}, line {number} is not JSON: {error.msg} at column {error.colno}") from None
            yield _document(record, f"{name}, line {number}")


def _json_documents(text: str, name: str) -> Iterator[str]:
    try:
        found = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise OctavoError(f"{name} is not JSON: {error}") from None
    for number, record in enumerate(found if isinstance(found, list) else [found], 1):
        yield _document(record, f"{name}, item {number}")


def _document(record: Any, where: str) -> str:
    """The text of a record: itself, its `text`, or the only string in it."""
    if isinstance(record, str):
        return record
    fields = record if isinstance(record, dict) else {}
    strings = [value for value in fields.values() if isinstance(value, str)]
    text = fields["text"] if "text" in fields else strings[0] if len(strings) == 1 else None
    if not isinstance(text, str):
        found = ", ".join(f"{key} ({type(value).__name__})" for key, value in fields.items()) or type(record).__name__
        raise OctavoError(f"{where} has no string in a field `text`, nor in one field only; found: {found}")
    return text
