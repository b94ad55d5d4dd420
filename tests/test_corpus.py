"""Every place a text may come from, and what is said when it does not."""

import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from octavo import corpus
from octavo.corpus import SOURCES, load_texts
from octavo.errors import OctavoError

DATA = Path("../shared/data/text")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no development data in {DATA}")
LINES = '{"text": "one"}\n\n{"text": "two\\nlines", "url": "u"}\n'


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    with corpus.OPENERS.get(path.suffix, open)(path, "wt", encoding=encoding) as file:
        file.write(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "documents"),
    [
        ("a.txt", "one\n\ntwo\n", ["one\n\ntwo\n"]),
        ("a.TXT.gz", "one", ["one"]),
        ("a.jsonl", LINES, ["one", "two\nlines"]),
        ("a.jsonl.gz", LINES, ["one", "two\nlines"]),
        ("a.jsonl.xz", LINES, ["one", "two\nlines"]),
        ("a.json", LINES, ["one", "two\nlines"]),
        ("a.json", '[\n"one", {"content": "two", "id": 3}]', ["one", "two"]),
        ("a.json", '{\n "text": "one"}', ["one"]),
        ("a.jsonl", '"one"\n{"text": ""}\n{"sentence": "two"}', ["one", "two"]),
        ("ünï.txt", "日本語 \N{OCTOPUS}", ["日本語 \N{OCTOPUS}"]),
    ],
)
def test_files(tmp_path: Path, name: str, text: str, documents: list[str]) -> None:
    texts = load_texts(str(write(tmp_path / name, text)))
    assert texts.name == name
    assert list(texts) == documents
    assert list(texts) == documents  # and again
    assert list(load_texts(name, tmp_path)) == documents


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one"), ("a.jsonl", '"one"'), ("a.json", '["one"]')):
        assert list(load_texts(str(write(tmp_path / name, text, "utf-8-sig")))) == ["one"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "", "a.txt holds no text"),
        ("a.txt", " \n", "a.txt holds no text"),
        ("a.json", "", "a.json holds no text"),
        ("a.json", "[]", "a.json holds no text"),
        ("a.jsonl", "\n", "a.jsonl holds no text"),
        ("a.jsonl", '{"text": "one"}\n{"text": }', r"a.jsonl, line 2 is not JSON: Expecting value at column 10"),
        ("a.json", '[\n"one",', "a.json is not JSON: .*line 2"),
        (
            "a.jsonl",
            '\n{"a": "x", "b": "y", "n": 1}',
            r"line 2 has no .*`text`.*found: a \(str\), b \(str\), n \(int\)",
        ),
        ("a.jsonl", '{"text": null, "title": "x"}', r"line 1 has no .*found: text \(NoneType\), title \(str\)"),
        ("a.jsonl", "3", "line 1 .*found: int"),
        ("a.json", '[{"n": 1}]', r"item 1 .*found: n \(int\)"),
    ],
)
def test_files_without_text(tmp_path: Path, name: str, text: str, says: str) -> None:
    texts = load_texts(str(write(tmp_path / name, text)))
    with pytest.raises(OctavoError, match=says):
        list(texts)


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "wide.jsonl").write_text(LINES, encoding="utf-16")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 100)[:60])
    (tmp_path / "not.txt.gz").write_text("plain")
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(LINES.encode() * 100)[:60])
    (tmp_path / "not.txt.xz").write_text("plain")
    for name, says in (
        ("latin.txt", "not UTF-8 .*byte 3.*convert"),
        ("wide.jsonl", "not UTF-8"),
        *((name, "incomplete or corrupted") for name in ("cut.jsonl.gz", "not.txt.gz", "cut.txt.xz", "not.txt.xz")),
    ):
        with pytest.raises(OctavoError, match=f"{name} is {says}"):
            list(load_texts(str(tmp_path / name)))


def test_wrong_names(tmp_path: Path) -> None:
    write(tmp_path / "ptb.train.txt", "x")
    write(tmp_path / "notes.md", "x")
    for name, data_dir, says in (
        ("c5", None, "no file and no set of texts named c5; .*ptb, c4, wikitext2, pileval$"),
        ("c5", tmp_path, r"holds ptb.train.txt$"),
        ("notes.md", tmp_path, "notes.md is not a .txt"),
        (str(tmp_path), None, "is a directory: name a .txt"),
        ("ptb", tmp_path / "none", "--data-dir .*none is not a directory"),
    ):
        with pytest.raises(OctavoError, match=says):
            load_texts(name, data_dir)


def nothing(**_: Any) -> None:
    raise AssertionError("the Hub was asked")


@pytest.mark.parametrize(
    ("name", "files", "calibration", "test"),
    [
        ("ptb", ["ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"], "ptb.train.txt", "ptb.test.txt"),
        ("PTB", ["ptb.valid.txt", "ptb.txt"], "ptb.txt", "ptb.valid.txt"),
        ("c4", ["c4_sample.jsonl", "c4_sample.md"], "c4_sample.jsonl", "c4_sample.jsonl"),
        (
            "c4",
            ["c4-train.00001-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"],
            "c4-train.00001-of-01024.json.gz",
            "c4-validation.00000-of-00008.json.gz",
        ),
        ("wikitext2", ["wikitext-2.dev.txt", "wikitext-2.test.txt"], "wikitext-2.dev.txt", "wikitext-2.test.txt"),
        ("pileval", ["pile-val.jsonl.xz"], "pile-val.jsonl.xz", "pile-val.jsonl.xz"),
    ],
)
def test_named_sets_in_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: list[str], calibration: str, test: str
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", nothing)
    for file in files:
        write(tmp_path / file, json.dumps({"text": file}) + "\n")
    for split, file in (("calibration", calibration), ("test", test)):
        texts = load_texts(name, tmp_path, split)  # type: ignore[arg-type]
        assert texts.name == f"{name.lower()} ({file})"
        assert file in next(iter(texts))


def test_a_test_is_never_calibrated_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "ptb.test.txt", "secret")

    def offline(**_: Any) -> None:
        raise ConnectionError("Name or service not known\nretry")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        OctavoError, match=r"put ptb.train.txt into .*--data-dir; .* holds ptb.test.txt \[Name or service"
    ):
        load_texts("ptb", tmp_path)
    with pytest.raises(OctavoError, match=r"c4 \(allenai/c4, validation\) .*check the network, or put c4.test.jsonl"):
        load_texts("c4", split="test")
    assert list(load_texts("ptb.test.txt", tmp_path)) == ["secret"]  # by its own name it may be


Row = dict[str, Any]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Rows that a fake Hub answers with; returns the arguments of each call."""

    def answer(*rows: Row | Exception) -> list[Row]:
        calls: list[Row] = []

        class Stream:
            def __iter__(self) -> Iterator[Row]:
                for row in rows:
                    if isinstance(row, Exception):
                        raise row
                    yield row

        def load_dataset(**arguments: Any) -> Stream:
            calls.append(arguments)
            return Stream()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(corpus, "find_spec", lambda _: True)
        return calls

    return answer


def test_hub_arguments(hub: Callable[..., list[Row]], tmp_path: Path) -> None:
    calls = hub({"text": "x"})
    names = [load_texts(name, data_dir, split).name for name in SOURCES  # type: ignore[arg-type]
             for split, data_dir in (("calibration", None), ("test", tmp_path))]  # fmt: skip
    assert names == [
        "ptb (ptb-text-only/ptb_text_only, train)", "ptb (ptb-text-only/ptb_text_only, test)",
        "c4 (allenai/c4, train)", "c4 (allenai/c4, validation)",
        "wikitext2 (Salesforce/wikitext, train)", "wikitext2 (Salesforce/wikitext, test)",
        "pileval (mit-han-lab/pile-val-backup, validation)", "pileval (mit-han-lab/pile-val-backup, validation)",
    ]  # fmt: skip
    assert all(call["streaming"] for call in calls)
    assert calls[0]["path"] == "parquet"
    assert calls[0]["data_files"]["train"].endswith("@refs%2Fconvert%2Fparquet/penn_treebank/train/0000.parquet")
    assert calls[2] == {"path": "allenai/c4", "split": "train", "streaming": True,
                        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}  # fmt: skip
    assert calls[5] == {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "streaming": True}


def test_a_set_is_the_same_text_from_both_places(hub: Callable[..., list[Row]], tmp_path: Path) -> None:
    lines = [" a b \n", " c <unk> N \n"]
    write(tmp_path / "ptb.train.txt", "".join(lines))
    hub(*({"sentence": line.strip()} for line in lines))
    assert list(load_texts("ptb")) == list(load_texts("ptb", tmp_path)) == ["a b c <unk> N"]

    lines = [" \n", " = Title = \n", " \n", " Text . \n"]
    write(tmp_path / "wikitext2.train.txt", "".join(lines))
    hub(*({"text": line if line.strip() else ""} for line in lines))
    expected = ["\n\n = Title = \n\n\n\n\n Text . \n"]
    assert list(load_texts("wikitext2")) == list(load_texts("wikitext2", tmp_path)) == expected


def test_hub_rows(hub: Callable[..., list[Row]]) -> None:
    hub({"text": "one", "url": "u", "timestamp": "t"}, {"text": " "}, {"text": "two"})
    assert list(load_texts("c4")) == ["one", "two"]
    hub({"a": "one", "b": "u"})
    with pytest.raises(OctavoError, match=r"c4 \(allenai/c4, train\), row 1 has no .*a \(str\), b \(str\)"):
        list(load_texts("c4"))
    hub({"text": "one"}, ConnectionError("reset"))
    documents = iter(load_texts("c4"))
    assert next(documents) == "one"
    with pytest.raises(OctavoError, match=r"c4 .*cannot be read from the Hub: check the network.*\[reset\]"):
        next(documents)


@pytest.mark.parametrize("absent", ["datasets", "zstandard"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setattr(corpus, "find_spec", lambda name: None if name == absent else True)
    with pytest.raises(OctavoError, match=rf"takes {absent} \(.*pip install .*\[datasets\]'\); or put"):
        load_texts("pileval")


def test_real_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments in the form they have for the Hub, with local files behind them."""
    sentences = ["a b", "c d"]
    train = tmp_path / "0000.parquet"
    datasets.Dataset.from_dict({"sentence": sentences}).to_parquet(train)
    arguments = SOURCES["ptb"].arguments["calibration"] | {"data_files": {"train": str(train)}}
    ptb = corpus.Source("ptb", {"calibration": arguments}, SOURCES["ptb"].join)

    (tmp_path / "c4" / "en").mkdir(parents=True)
    shard = SOURCES["c4"].arguments["test"]["data_files"]["validation"]
    write(tmp_path / "c4" / shard, LINES.replace("\n\n", "\n"))
    c4 = corpus.Source(str(tmp_path / "c4"), SOURCES["c4"].arguments)

    monkeypatch.setattr(corpus, "SOURCES", {"ptb": ptb, "c4": c4})
    assert list(load_texts("ptb")) == ["a b c d"]
    texts = load_texts("c4", split="test")
    assert list(texts) == list(texts) == ["one", "two\nlines"]
    with pytest.raises(OctavoError, match=r"c4.*cannot be read"):  # that shard is not there
        load_texts("c4")


@needs_data
@pytest.mark.parametrize(
    ("name", "split", "file", "documents", "chars"),
    [
        ("ptb", "calibration", "ptb.train.txt", 1, 5_000_000),
        ("ptb", "test", "ptb.test.txt", 1, 440_000),
        ("wikitext2", "test", "wikitext2.valid.txt", 1, 1_100_000),
        ("c4", "calibration", "c4_sample.jsonl", 1000, 2_000_000),
    ],
)
def test_development_data(name: str, split: corpus.Split, file: str, documents: int, chars: int) -> None:
    texts = load_texts(name, DATA, split)
    assert texts.name == f"{name} ({file})"
    found = list(texts)
    assert len(found) == documents
    assert sum(map(len, found)) > chars
