"""`octavo accuracy` on the bundled model: on a text and on benchmark tasks, its tables, its document and its errors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.loading import LoadOptions
from octavo.errors import install
from octavo.measure import tasks
from octavo.measure.budget import Windows
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from tests.conftest import status_of
from tests.measure.tasks.raw_files import write_raw_files

DATA = Path(__file__).parents[3] / "shared" / "data" / "eval"
SMALL = ["--windows", "2", "--window", "96"]
Run = Callable[..., int]


@pytest.fixture
def octavo(pamphlet: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `octavo accuracy` on the bundled model that is loaded already; returns the exit status."""
    monkeypatch.setattr(LoadOptions, "load", lambda *_, **__: pamphlet)
    monkeypatch.setattr("octavo.measure.accuracy.sizes.ANSWERS", Windows(16, 16))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*argv: object) -> int:
        return status_of("accuracy", *argv)

    return run


@pytest.fixture
def error(octavo: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The last line, with which a bad command line is answered."""

    def run(*argv: object) -> str:
        assert octavo(*argv) == 2
        out, err = capsys.readouterr()
        assert not out
        lines = err.splitlines()
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
        return lines[-1]

    return run


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 8 tokens, however many a task asks for."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.utils import normalize_gen_kwargs

    def shortened(asked: dict[str, Any], most: int) -> dict[str, Any]:
        return {**normalize_gen_kwargs(asked, most), "max_gen_toks": 8}

    monkeypatch.setattr("octavo.measure.tasks.harness.normalize_gen_kwargs", shortened)


@pytest.fixture(scope="session")
def calibrated(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration.save(tmp_path_factory.mktemp("calibration"))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_raw_files(tmp_path / "raw")
    return tmp_path / "raw"


# --- on a text --------------------------------------------------------------------------------------------------------


def test_theory_comes_first_then_what_was_measured(octavo: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo(*SMALL, "--kv", "fp32,int8-token,int4-token") == 0
    out, err = capsys.readouterr()
    order = [
        "(computed)",
        "bytes per token",
        "6,144",
        "1,560",
        "Measured on 190 tokens of evaluation.txt",
        "perplexity",
    ]
    order += ["KL from fp32, nats", "same top token", "KL by position", "1–64", "65–95", "Greedy answers beside fp32's"]
    places = [out.index(text) for text in order]
    assert places == sorted(places)
    assert "nan" not in out
    assert "2 windows of 96 tokens in 3 formats, about" in err
    assert "greedy answers: 2 answers of 16 tokens in 3 formats" in err
    assert "-:--" not in err


def test_the_document_holds_every_number(octavo: Run, calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo(*SMALL, "--kv", "int8", "--calibration", calibrated, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["baseline"], document["dtype"], document["model"]) == ("fp32", "float32", "pamphlet")
    assert [(row["format"], row["bytes_per_token"]) for row in document["theory"]] == [("fp32", 6144), ("int8", 1536)]
    text = document["text"]
    base, int8 = text["scores"]
    assert (text["windows"], text["window"], base["tokens"], base["kl"], base["loss_change"]) == (2, 96, 190, 0, 0)
    assert 0 < int8["kl"] < int8["kl_p99"] <= int8["kl_max"] < 0.1
    change = int8["perplexity"] / base["perplexity"]
    assert math.exp(int8["loss_change"]) == pytest.approx(change)
    assert int8["loss_change_error"] < base["perplexity_error"] / base["perplexity"]  # paired
    assert [(part["start"], part["stop"]) for part in int8["kl_by_bin"]] == [(1, 65), (65, 96)]
    mean = sum(part["kl"] * (part["stop"] - part["start"]) for part in int8["kl_by_bin"]) / 95
    assert mean == pytest.approx(int8["kl"])
    [greedy] = text["greedy"]["rows"]
    ends = [16 if point is None else point for point in greedy["points"]]
    assert (len(ends), greedy["median"], greedy["equal"]) == (2, sum(ends) / 2, greedy["points"].count(None))


def test_a_single_window_has_no_standard_error(octavo: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo("--windows", "1", "--window", "64", "--kv", "int8-token", "--json") == 0
    score = json.loads(capsys.readouterr().out)["text"]["scores"][1]
    assert score["kl_error"] is None
    assert score["kl"] > 0


def test_bad_texts_and_windows_are_one_line(error: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Only a few words.")
    (tmp_path / "latin.txt").write_bytes("Übermaß".encode("latin-1"))
    assert "has 6 tokens and one window needs 96" in error("--text", tmp_path / "short.txt", *SMALL)
    assert "is not UTF-8 text" in error("--text", tmp_path / "latin.txt")
    assert "sets known by name are ptb, c4" in error("--text", "nothing.txt")
    assert "there is no KV format 'int7'" in error("--kv", "fp16,int7")
    assert "int8 needs a calibration of pamphlet" in error("--kv", "fp16,int8")
    assert "--limit goes with --tasks" in error("--limit", "3")
    assert "--window goes with --text" in error("--window", "64", "--tasks", "gsm8k")


# --- on tasks ---------------------------------------------------------------------------------------------------------


def test_wrong_names_and_missing_files_say_what_there_is(error: Callable[..., str], raw: Path, tmp_path: Path) -> None:
    names = error("--tasks", "winogrand", "--data-dir", raw)
    assert "there is no task 'winogrand'" in names
    assert all(name in names for name in tasks.BENCHMARKS)
    assert "no subset 'sorting'; its subsets are boolean_expressions, " in error("--tasks", "bbh/sorting")
    assert "is not a directory" in error("--tasks", "gsm8k", "--data-dir", tmp_path / "none")
    assert "put eprstmt/dev_few_all.json into --data-dir" in error("--tasks", "eprstmt")
    (raw / "openbookqa/test_complete.jsonl").unlink()
    (raw / "nq_open/NQ-open.dev.jsonl").rename(raw / "nq_open/dev.jsonl")
    facts = error("--tasks", "openbookqa_fact", "--data-dir", raw)
    assert "reads openbookqa/test_complete.jsonl (it is Data/Additional/" in facts
    assert "openbookqa holds test.jsonl" in facts
    assert "nq_open holds dev.jsonl" in error("--tasks", "nq_open", "--data-dir", raw)


def test_without_the_harness_it_says_what_to_install(
    error: Callable[..., str], raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    assert install("tasks") in error("--tasks", "gsm8k", "--data-dir", raw)


def test_documents_that_cannot_be_used_are_named(error: Callable[..., str], raw: Path) -> None:
    pytest.importorskip("lm_eval")
    file = raw / "winogrande/dev.jsonl"
    damages = {
        b'{"sentence": "A _", "option1": "a"}\n': "document 1: no option2, answer; found option1, sentence",
        b'{"sentence": "A _"\n': "line 1 is not JSON",
        b"\xff\xfe": "is not UTF-8 text",
        b"": "holds no documents",
    }
    for content, message in damages.items():
        file.write_bytes(content)
        assert message in error("--tasks", "winogrande", "--data-dir", raw, "--kv", "int8-token")


def test_results_are_kept_and_a_second_run_takes_them(
    octavo: Run, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from octavo.measure.tasks import run as benchmark

    ran: list[str] = []
    really = benchmark.ask_chunk

    def ask(llm: Any, task: Any, documents: range, title: str, progress: Any) -> list[dict[str, Any]]:
        ran.append(title)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return really(llm, task, documents, title, progress)

    monkeypatch.setattr(benchmark, "ask_chunk", ask)
    same = ["--tasks", "winogrande,crows_pairs", "--data-dir", raw, "--kv", "fp32,int4-token"]
    same += ["--limit", "3", "--results", tmp_path / "kept", "--json"]
    names = [f"{task} in {kv}, 1–3 of 3" for task in ("winogrande", "crows_pairs") for kv in ("fp32", "int4-token")]
    assert octavo(*same) == 130
    assert ran == names[:3]
    assert octavo(*same) == 0
    assert ran[3:] == names[2:]
    first = json.loads(capsys.readouterr().out)["tasks"]
    assert octavo(*same) == 0
    assert len(ran) == 5
    assert json.loads(capsys.readouterr().out)["tasks"] == first

    assert [(row["name"], row["items"], row["metric"]) for row in first["rows"]] == [
        ("winogrande", 3, "accuracy"),
        ("crows_pairs", 3, "stereotype"),
    ]
    for row in first["rows"]:
        difference = row["scores"]["int4-token"] - row["scores"]["fp32"]
        assert row["differences"] == {"int4-token": pytest.approx(difference)}
    torn = next((tmp_path / "kept").glob("winogrande-fp32-*"))
    torn.write_text(torn.read_text()[:40])
    (raw / "crows_pairs/crows_pairs_anonymized.csv").open("a").write(
        '9,"The cat is old.","The dog is old.",stereo,age\n'
    )
    assert octavo(*same) == 0
    assert ran[5:] == [names[0], *names[2:]]


def test_more_documents_are_added_to_those_that_were_asked_and_answers_are_the_same(
    octavo: Run, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from octavo.measure.tasks import run as benchmark

    monkeypatch.setattr(benchmark, "AT_ONCE", 2)
    same = ["--tasks", "winogrande", "--data-dir", raw, "--kv", "fp32,int4-token", "--json"]
    assert octavo(*same, "--limit", "1", "--results", tmp_path / "grown") == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["rows"][0]["items"] == 1
    found = []
    for directory in ("grown", "whole"):
        assert octavo(*same, "--limit", "3", "--results", tmp_path / directory) == 0
        found.append(json.loads(capsys.readouterr().out)["tasks"]["rows"])
    assert found[0] == found[1]


@pytest.mark.usefixtures("short")
def test_examples_stand_before_questions_and_are_not_asked_themselves(
    octavo: Run, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --shots the first documents are examples: of the questions' own file they are not asked, of another they
    leave all questions. Results without examples are others."""
    (raw / "gsm8k/train.head200.jsonl").write_text('{"question": "What is 9?", "answer": "#### 9"}\n' * 2)
    same = ["--data-dir", raw, "--kv", "fp32,int8-token", "--json", "--results", tmp_path / "kept"]
    counts = {}
    for shots in (0, 2):
        assert octavo(*same, "--tasks", "winogrande,gsm8k,crows_pairs", "--shots", shots, "--budget", "none") == 0
        rows = json.loads(capsys.readouterr().out)["tasks"]["rows"]
        counts[shots] = {row["name"]: row["items"] for row in rows}
    assert counts == {
        0: {"winogrande": 4, "gsm8k": 4, "crows_pairs": 4},
        2: {"winogrande": 2, "gsm8k": 4, "crows_pairs": 4},
    }
    kept = [json.loads(path.read_text())["key"] for path in (tmp_path / "kept").glob("gsm8k-fp32*")]
    assert sorted(key["shots"] for key in kept) == [0, 2]


def test_a_budget_chooses_how_many_documents_each_task_gets_and_says_so(
    octavo: Run, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    same = ["--tasks", "winogrande,crows_pairs", "--data-dir", raw, "--kv", "fp32,int4-token"]
    assert octavo(*same, "--budget", "10m", "--results", tmp_path / "kept") == 0
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(r"winogrande: (\d+) of \1 documents, about", err), "so few that all are asked"
    assert "crows_pairs: " in err


def test_all_runs_what_it_finds_and_names_the_rest(
    octavo: Run, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    (raw / "openbookqa/test_complete.jsonl").unlink()
    (raw / "bbh/snarks.json").unlink()
    for file in ("gsm8k/test.jsonl", "nq_open/NQ-open.dev.jsonl"):
        (raw / file).unlink()
    assert octavo("--tasks", "all", "--data-dir", raw, "--kv", "int8-token", "--results", tmp_path / "kept") == 0
    out, err = capsys.readouterr()
    first, second = (part.splitlines() for part in out.split("dataset")[1:])  # in 80 columns the table has two parts
    assert first[0].split() == ["metric", "n", "fp32", "solved"]
    assert second[0].split() == ["metric", "n", "int8-token", "−", "fp32"]
    for part in (first, second):
        rows = [line.split() for line in part if " ± " in line]
        assert [row[1] for row in rows[:4]] == ["winogrande", "openbookqa", "eprstmt", "crows_pairs"]
    assert out.count("not run: ") == 4
    assert "not run: bbh reads bbh/snarks.json" in out
    assert "crows_pairs in int8-token" in err


@pytest.mark.usefixtures("short")
@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' public files are not at ../shared/data/eval")
def test_every_task_runs_on_its_public_files(
    octavo: Run, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["winogrande", "nq_open", "gsm8k", "bbh/snarks", "bbh/navigate", "openbookqa", "eprstmt", "crows_pairs"]
    common = ["--data-dir", DATA, "--calibration", calibrated, "--results", tmp_path / "kept", "--limit", "1", "--json"]
    assert octavo("--tasks", ",".join(names), "--kv", "fp16,int8", *common) == 0
    rows = json.loads(capsys.readouterr().out)["tasks"]["rows"]
    rest = tasks.BENCHMARKS.keys() - {"bbh", "openbookqa_fact"}  # the facts are not there
    assert {row["name"]: row["items"] for row in rows} == dict.fromkeys(rest, 1) | {"bbh (2 of 27)": 2}
    assert all(0 <= score <= 100 for row in rows for score in row["scores"].values())
