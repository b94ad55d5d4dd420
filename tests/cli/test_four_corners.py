"""16- and 4-bit weights with 16- and 8-bit caches, from the command line: pamphlet rounded to AWQ beside itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from octavo.cli import main
from octavo.models.model import BUNDLED
from octavo.quant.calibration import Calibration
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
        with pytest.raises(SystemExit) as exit:
            main(list(map(str, argv)))
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

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
    monkeypatch.setattr(sys.modules["octavo.cli.accuracy"], "ANSWER", 4)
    for model in (awq, "pamphlet"):
        assert octavo("calibrate", model, *SMALL)[0] == 0
    asked = ["--baseline", "pamphlet", "--kv", "bf16,int8", "--windows", "1", "--window", "64", "--json"]
    code, out, err = octavo("accuracy", awq, *asked)
    assert code == 0, err
    found = json.loads(out)
    names = [score["name"] for score in found["text"]["scores"]]
    assert names == ["bf16/bf16", "bf16/int8", "int4/bf16", "int4/int8"]
    kl = {score["name"]: score["kl"] for score in found["text"]["scores"]}
    assert kl["bf16/bf16"] == 0 < kl["bf16/int8"] < kl["int4/bf16"] < 1
    assert found["text"]["kv_loss"].keys() == {"bf16", "int4"}


def test_speed_of_all_four(octavo: Run, awq: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("octavo.measure.ceiling.READ_BYTES", 1 << 20)
    asked = ["--baseline", "pamphlet", "--kv", "bf16,int8-token", "--batch-size", "1", "--context", "64"]
    code, out, err = octavo("speed", awq, *asked, "--tokens", "2", "--rounds", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["kv"] for row in found["speed"]] == [
        "bf16/bf16", "bf16/int8-token", "int4/bf16", "int4/int8-token",
    ]  # fmt: skip
    read = {row["kv"]: row["weight_bytes"] for row in found["theory"]}
    assert read["int4/bf16"] < 0.5 * read["bf16/bf16"]


def test_memory_of_all_four(octavo: Run, awq: Path):
    code, out, err = octavo("memory", "--config", awq / "config.json", "--batch-size", "8", "--json")
    assert code == 0, err
    rows = {(row["kind"], row["format"]): row for row in json.loads(out)["points"]}
    assert list(rows) == [("bf16", "bf16"), ("bf16", "int8"), ("int4", "bf16"), ("int4", "int8")]
    plain = json.loads(octavo("memory", "--config", BUNDLED / "config.json", "--batch-size", "8", "--json")[1])
    assert rows["bf16", "bf16"]["weights"] == plain["weights"]["bytes"]
    assert rows["int4", "int8"]["total"] == rows["int4", "int8"]["weights"] + rows["bf16", "int8"]["cache"]


@pytest.mark.parametrize("verb", ["accuracy", "speed"])
def test_a_baseline_of_the_same_kind_is_refused(octavo: Run, awq: Path, verb: str):
    code, _, err = octavo(verb, awq, "--baseline", awq, "--kv", "bf16")
    assert code == 2
    assert "its weights are int4 like MODEL's; name the 16-bit model" in err


def test_memory_refuses_what_is_no_kind_or_no_baseline(octavo: Run, awq: Path):
    for more, message in (
        (["--weights", "int3"], "--weights int3: this model's are bf16 or int4"),
        (["--baseline", awq], "is not the 16-bit model of a 4-bit MODEL"),
    ):
        code, _, err = octavo("memory", awq, *more)
        assert code == 2
        assert message in err
