"""A data directory of a few invented documents in the shapes of the benchmarks' raw files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.measure.tasks import BBH


def write_raw_files(directory: Path) -> None:
    options = ["a press", "a river", "a crow", "a lamp"]
    choices = [{"text": text, "label": label} for text, label in zip(options, "ABCD", strict=True)]
    stems = ["Sheets are folded on", "Boats go down", "Black feathers are those of", "At night we read by"]
    items = [
        {"id": str(i), "question": {"stem": stem, "choices": choices}, "answerKey": "ABCD"[i]}
        for i, stem in enumerate(stems)
    ]
    sums = [
        {"question": f"What is {i} and {i + 1}?", "answer": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}"}
        for i in range(4)
    ]
    blanks = [
        {"sentence": f"The {a} did not fit the {b} as the _ was small.", "option1": a, "option2": b, "answer": "2"}
        for a, b in [("book", "bag"), ("boat", "lake"), ("fox", "hole"), ("page", "frame")]
    ]
    questions = [{"question": f"who wrote book {i}", "answer": ["A", "B"]} for i in range(4)]
    reviews = [("很好", "Positive"), ("坏的", "Negative")] * 2
    pairs = [("fox", "crow"), ("man", "boy"), ("king", "page"), ("ship", "boat")]
    _lines(directory / "winogrande/dev.jsonl", blanks)
    _lines(directory / "nq_open/NQ-open.dev.jsonl", questions)
    _lines(directory / "gsm8k/test.jsonl", sums)
    _lines(directory / "gsm8k/train.head200.jsonl", sums)
    _lines(directory / "openbookqa/test.jsonl", items)
    _lines(directory / "openbookqa/test_complete.jsonl", [{**item, "fact1": "things have uses"} for item in items])
    _lines(
        directory / "eprstmt/dev_few_all.json",
        [{"id": i, "sentence": text, "label": label} for i, (text, label) in enumerate(reviews)],
    )
    _write(
        directory / "crows_pairs/crows_pairs_anonymized.csv",
        ",sent_more,sent_less,stereo_antistereo,bias_type\n"
        + "".join(
            f'{i},"The {a}, she said, is old.","The {b}, she said, is old.",stereo,age\n'
            for i, (a, b) in enumerate(pairs)
        ),
    )
    for subset in BBH:
        examples = [{"input": f"What is {subset} {i}?", "target": "yes"} for i in range(4)]
        _write(directory / f"bbh/{subset}.json", json.dumps({"canary": "none", "examples": examples}))


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
