"""`octavo speed`, `doctor` and `report` from the command line: one JSON document, statuses, and errors in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import BloomConfig

from octavo.measure.budget import Windows
from octavo.measure.doctor import diagnose as doctor
from octavo.measure.speed import roofline
from octavo.models.model import BUNDLED
from tests.conftest import status_of


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "READ_BYTES", 1 << 20)
    for name, value in {"WANTED": Windows(2, 64), "LEAST": Windows(2, 64), "CALIBRATED": 2}.items():
        monkeypatch.setattr(doctor, name, value)


def run(*arguments: str) -> int:
    return status_of(*arguments)


SPEED = (
    "speed",
    "--dtype",
    "fp32",
    "--kv",
    "fp32,int8-token",
    "--batch-size",
    "2",
    "--context",
    "64",
    "--tokens",
    "2",
    "--rounds",
    "1",
)


def test_speed_prints_theory_before_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SPEED) == 0
    out, err = capsys.readouterr()
    assert re.match(r"loading pamphlet: 19 MiB of weights\nCPU: .+, .+; weights fp32, computing float32\n", err)
    assert 0 < out.index("streaming read") < out.index("(computed)") < out.index("Measured")
    assert "int8-token" in out


def test_speed_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SPEED, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["baseline"]) == ("speed", "fp32")
    assert [row["kv"] for row in found["speed"]] == ["fp32", "int8-token"]
    assert {row["how"] for row in found["theory"]} == {"computed"}
    assert {row["how"] for row in [*found["speed"], found["bandwidth"]]} == {"measured"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "1,x"), "--batch-size takes whole numbers with commas between, like 1,8; not '1,x'"),
        (("--context", "0"), "--context takes whole numbers"),
        (("--context", "4096"), "beyond the model's 2048"),
        (("--kv", "int9"), "no KV format 'int9'"),
        (("--kv", "int8"), "octavo calibrate"),
    ],
)
def test_speed_refuses_with_one_line(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where no calibration is
    assert run("speed", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_healthy_model_is_status_0_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--dtype", "fp32") == 0
    out = capsys.readouterr().out
    assert "healthy" in out
    assert "6 query heads on 2 KV heads of 64" in out


def test_doctor_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--dtype", "fp32", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["accepted"], found["healthy"]) == ("doctor", True, True)
    assert found["machine"]["torch"]


def test_a_refused_architecture_is_status_1_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BloomConfig(vocab_size=4096, hidden_size=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((BUNDLED / name).read_bytes())
    assert run("doctor", str(tmp_path), "--load-format", "dummy") == 1
    out = capsys.readouterr().out
    assert "bloom does not send its attention through" in " ".join(out.split())
    assert "refused" in out
    assert run("doctor", str(tmp_path), "--load-format", "dummy", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["accepted"], found["healthy"]) == (False, False)
    assert "bloom" in found["findings"][0]["text"]


def test_random_weights_are_examined_on_random_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    run("doctor", "--load-format", "dummy", "--dtype", "fp32", "--json")
    assert json.loads(capsys.readouterr().out)["text"].startswith("random tokens")


@pytest.mark.parametrize("verb", ["doctor", "report", "speed"])
def test_a_model_that_is_not_there_is_status_2(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(verb, "./nowhere") == 2
    assert "There is no directory ./nowhere" in capsys.readouterr().err


def test_report_needs_a_directory_it_can_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    (tmp_path / "file").touch()
    assert run("report", "--out", str(tmp_path / "file" / "x")) == 2
    assert "--out" in capsys.readouterr().err


def test_report_reads_sizes_of_memory_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    assert run("report", "--out", str(tmp_path), "--memory", "much") == 2
    assert "'much' is not an amount of memory" in capsys.readouterr().err
