"""16- and 4-bit weights with 16- and 8-bit caches, from the command line: pamphlet rounded to AWQ beside itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from octavo.measure.budget import Windows
from octavo.models.model import BUNDLED
from octavo.quant.calibration import Calibration
from tests.conftest import status_of
from tests.weights.rounding import described, packed, write

Run = Callable[..., tuple[int, str, str]]
SMALL = ["--calib-dataset", str(BUNDLED / "evaluation.txt"), "--calib-samples", "2", "--calib-seqlen", "64"]


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pamphlet-awq")
    stored, _ = packed(load_file(BUNDLED / "model.safetensors"), "awq", 128)
    for file in BUNDLED.glob("*.json"):
        shutil.copy(file, path)
    shutil.copy(BUNDLED / "chat_template.jinja", path)
    config = json.loads((BUNDLED / "config.json").read_text())
    return write(path, config | {"quantization_config": described("awq", 128)}, stored)


@pytest.fixture
def octavo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*argv: object) -> tuple[int, str, str]:
        status = status_of(*argv)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_page_s_last_line(octavo: Run, awq: Path, calibration: Calibration, tmp_path: Path):
    asked = ["generate", awq, "--model-format", "awq", "--quant-policy", "4", "--prompt", "Once", "--max-tokens", "3"]
    code, _, err = octavo(*asked, "--calibration", calibration.save(tmp_path))
    assert code == 2
    assert "made for other weights" in err
    assert "octavo calibrate" in err
    assert octavo("calibrate", awq, *SMALL)[0] == 0
    code, out, err = octavo(*asked)
    assert (code, bool(out.strip())) == (0, True), err


def test_accuracy_of_all_four(octavo: Run, awq: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("octavo.measure.accuracy.sizes.ANSWERS", Windows(2, 4))
    for model in (awq, "pamphlet"):
        assert octavo("calibrate", model, *SMALL)[0] == 0
    asked = ["--baseline", "pamphlet", "--kv", "bf16,int8", "--windows", "1", "--window", "64", "--json"]
    code, out, err = octavo("accuracy", awq, *asked)
    assert code == 0, err
    found = json.loads(out)
    names = [score["name"] for score in found["text"]["scores"]]
    assert names == ["W16 bf16", "W16 int8", "W4 bf16", "W4 int8"]
    kl = {score["name"]: score["kl"] for score in found["text"]["scores"]}
    assert kl["W16 bf16"] == 0 < kl["W16 int8"] < kl["W4 bf16"] < 1
    sixteen, four = found["text"]["kv_loss"]
    assert (sixteen["weights"], four["weights"], four["format"], four["from"]) == ("bf16", "int4", "int8", "bf16")
    assert sixteen["kl"] == kl["W16 int8"]
    assert 0 < four["kl"] < kl["W4 bf16"]
    tables = " ".join(octavo("accuracy", awq, *asked[:-1])[1].split())
    assert "The cache alone, from bf16 with the same weights" in tables


def test_speed_of_all_four(octavo: Run, awq: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("octavo.measure.speed.roofline.READ_BYTES", 1 << 20)
    asked = ["--baseline", "pamphlet", "--kv", "bf16,int8-token", "--batch-size", "1", "--context", "64"]
    code, out, err = octavo("speed", awq, *asked, "--tokens", "2", "--rounds", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["kv"] for row in found["speed"]] == [
        "W16 bf16", "W16 int8-token", "W4 bf16", "W4 int8-token",
    ]  # fmt: skip
    read = {row["kv"]: row["weight_bytes"] for row in found["theory"]}
    assert read["W4 bf16"] < 0.5 * read["W16 bf16"]


def test_memory_of_all_four(octavo: Run, awq: Path):
    code, out, err = octavo("memory", "--config", awq / "config.json", "--batch-size", "8", "--json")
    assert code == 0, err
    rows = {(row["kind"], row["format"]): row for row in json.loads(out)["points"]}
    assert list(rows) == [("bf16", "bf16"), ("bf16", "int8"), ("int4", "bf16"), ("int4", "int8")]
    plain = json.loads(octavo("memory", "--config", BUNDLED / "config.json", "--batch-size", "8", "--json")[1])
    assert rows["bf16", "bf16"]["weights"] == plain["weights"]["bytes"]
    assert rows["int4", "int8"]["total"] == rows["int4", "int8"]["weights"] + rows["bf16", "int8"]["cache"]


@pytest.mark.slow
def test_the_report_of_all_four(octavo: Run, awq: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    sizes: dict[str, dict[str, Any]] = {
        "doctor.diagnose": {"WANTED": Windows(2, 64), "LEAST": Windows(2, 64), "CALIBRATED": 2},
        "report.sizes": {"COMPARED": Windows(2, 256), "CALIBRATED": Windows(2, 64), "LONGEST": 256, "SHORTEST": 256,
                         "TIMED": (((1,), 64),)},
        "report.combinations": {"TOKENS": 2, "ROUNDS": 1},
        "speed.roofline": {"READ_BYTES": 1 << 20},
    }  # fmt: skip
    for module, values in sizes.items():
        for name, value in values.items():
            monkeypatch.setattr(f"octavo.measure.{module}.{name}", value)
    code, out, err = octavo("report", awq, "--baseline", "pamphlet", "--out", tmp_path / "report", "--json")
    assert code == 0, err
    corners = json.loads(out)["corners"]
    assert [(c["weights"], c["kv"]) for c in corners] == [
        ("bf16", "bf16"), ("bf16", "kv8"), ("int4", "bf16"), ("int4", "kv8"),
    ]  # fmt: skip
    assert [row["batch_size"] for row in corners[3]["speed"]] == [1, 8]
    assert corners[2]["score"]["cache_alone"]["kl"] == 0 < corners[3]["score"]["cache_alone"]["kl"]
    assert corners[2]["weight_bytes"] < corners[0]["weight_bytes"]
    for page in ("report.html", "report.md"):
        text = (tmp_path / "report" / page).read_text(encoding="utf-8")
        assert "million parameters in int4" in text
        assert all(f"{corner['score']['perplexity']:.2f}" in text for corner in corners)


def test_the_baseline_takes_the_type_of_the_four_bit_model(awq: Path):
    from octavo.cli.candidates import load_baseline
    from octavo.cli.loading import LoadOptions
    from octavo.models.model import Model

    four = Model.load(awq, dtype="fp16", device="cpu")
    assert load_baseline(LoadOptions(device="cpu"), "pamphlet", four).bound.dtype == four.bound.dtype


def test_token_formats_calibrated_with_one_kind_of_weights_are_told(
    octavo: Run, awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("octavo.measure.accuracy.sizes.ANSWERS", Windows(2, 4))
    own = tmp_path / "calibration"
    assert octavo("calibrate", awq, *SMALL, "--work-dir", own)[0] == 0
    asked = ["--kv", "bf16,int8-token", "--windows", "1", "--window", "64", "--calibration", own, "--json"]
    code, _, err = octavo("accuracy", awq, "--baseline", "pamphlet", *asked)
    assert (code, err.count("int8-token: pamphlet has no calibration and the other model has")) == (0, 1), err


@pytest.mark.parametrize(
    ("model", "baseline", "message"),
    [
        ("int4", "int4", "its weights are int4 like MODEL's; name the 16-bit model"),
        ("bf16", "int4", "--baseline goes with a MODEL of 4-bit weights, and those of pamphlet are bf16"),
        ("bf16", "bf16", "--baseline goes with a MODEL of 4-bit weights"),
    ],
)
def test_what_is_no_pair_is_refused(octavo: Run, awq: Path, model: str, baseline: str, message: str):
    named = {"int4": awq, "bf16": "pamphlet"}
    code, _, err = octavo("accuracy", named[model], "--baseline", named[baseline], "--kv", "bf16")
    assert code == 2
    assert message in err


def test_memory_refuses_what_is_no_kind_or_no_baseline(octavo: Run, awq: Path):
    for more, message in (
        (["--weights", "int3"], "--weights int3: this model's are bf16 or int4"),
        (["--baseline", awq], "is not the 16-bit model of a 4-bit MODEL"),
    ):
        code, _, err = octavo("memory", awq, *more)
        assert code == 2
        assert message in err
