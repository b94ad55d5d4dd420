"""The raw public files of the benchmarks as documents with the fields that the harness's prompts expect.

`load` stands in for `datasets.load_dataset` in a task's definition (its `custom_dataset`).
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.measure.tasks import BENCHMARKS, Subtask, select

Record = dict[str, Any]


def load(benchmark: str, data_dir: str = "", **_: Any) -> dict[str, Any]:
    """Documents of a benchmark, or of a subset named like bbh/word_sorting, as `datasets.Dataset` by split.

    The harness passes all of a task's metadata; `data_dir` is what counts.
    """
    from datasets import Dataset

    if not data_dir:
        raise OctavoError(f"{benchmark} is read from files: name their directory, --metadata '{{\"data_dir\": …}}'")
    [subtask], _ = select(benchmark, Path(data_dir))
    return {split: Dataset.from_list(list(read(path, subtask))) for split, path in subtask.files.items()}


def check(subtask: Subtask) -> None:
    """Raise OctavoError for files that cannot be used, before a model is loaded."""
    for path in subtask.files.values():
        for _ in read(path, subtask):
            pass


def digest(subtask: Subtask) -> str | None:
    """Identifies the documents' bytes; None for those of the Hub."""
    if not subtask.files:
        return None
    total = hashlib.sha256()
    for _, path in sorted(subtask.files.items()):
        total.update(_bytes(path))
    return total.hexdigest()[:16]


def read(path: Path, subtask: Subtask) -> Iterator[Record]:
    """The documents of one file. Raises OctavoError for what is no text, no JSON, or lacks a field."""
    try:
        text = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OctavoError(f"{path} is not UTF-8 text (see byte {error.start}): fetch it again") from None
    records = list(csv.DictReader(io.StringIO(text, newline=""))) if path.suffix == ".csv" else list(_json(text, path))
    if not records:
        raise OctavoError(f"{path} holds no documents: fetch it again")
    needed = BENCHMARKS[subtask.benchmark.name].fields
    convert = CONVERSIONS.get(subtask.benchmark.name, dict)
    for number, record in enumerate(records, 1):
        found = sorted(record) if isinstance(record, dict) else [type(record).__name__]
        if lacking := [name for name in needed if name not in found]:
            raise OctavoError(f"{path}, document {number}: no {', '.join(lacking)}; found {', '.join(map(str, found))}")
        try:
            yield convert(record)
        except (KeyError, TypeError) as error:
            raise OctavoError(f"{path}, document {number} has another shape than {subtask.name}'s ({error})") from None


def _json(text: str, path: Path) -> Iterator[Any]:
    """The records of JSON lines, of a JSON list, or of an object's `examples`."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise OctavoError(f"{path}, line {number} is not JSON: {error.msg}") from None
        return
    if isinstance(whole, dict):
        whole = whole.get("examples", [whole])
    yield from whole


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OctavoError(f"{path} cannot be read: {error.strerror}") from None


def _openbookqa(record: Record) -> Record:
    question = record["question"]
    choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
    fact = {"fact1": record["fact1"]} if "fact1" in record else {}
    return {"question_stem": question["stem"], "choices": choices, "answerKey": record["answerKey"], **fact}


CONVERSIONS: dict[str, Callable[[Record], Record]] = {
    "openbookqa": _openbookqa,
    "openbookqa_fact": _openbookqa,
    "bbh": lambda record: {"input": record["input"], "target": record["target"]},
    "crows_pairs": lambda record: {key: record[key] for key in ("sent_more", "sent_less", "bias_type")},
}
