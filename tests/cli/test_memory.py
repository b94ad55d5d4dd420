"""`octavo memory` and `octavo plan`: one JSON document, tables that say what was measured, errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.measure.memory import points as memory
from octavo.measure.memory.process import CannotMeasure, Filled, Request
from tests.conftest import status_of
from tests.weights.rounding import described, write

INTERNLM = Path(__file__).parents[2] / "benchmarks" / "geometries" / "internlm-chat-7b.json"
MIB = 1 << 20
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def octavo(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; returns exit status, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        status = status_of(*argv)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements by arithmetic: 100 MiB of rest in every point, and no room for 48 sessions."""

    def measure(request: Request) -> Filled:
        if request.batch == 48:
            raise CannotMeasure("it needs too much")
        peak = request.weights + request.cache + 100 * MIB
        tokens = request.batch * request.context
        return Filled(request.weights, request.cache, 0, peak, peak - MIB, 60 * MIB, None, tokens // 2)

    monkeypatch.setattr(memory, "measure", measure)


def document(result: tuple[int, str, str]) -> dict[str, Any]:
    status, out, err = result
    assert (status, _said(err)) == (0, [])
    return json.loads(out)


def _said(err: str) -> list[str]:
    """Lines on stderr but for the first, which is there while torch is imported."""
    return [line for line in err.splitlines() if not line.startswith("reading the sizes of ")]


def test_the_page_s_table_from_a_config_alone(octavo: Run) -> None:
    found = document(octavo("memory", "--config", INTERNLM, "--kv", "fp16,int8", "--json"))
    assert found["command"] == "memory"
    assert found["model"] == "internlm-chat-7b"
    assert [row["session"] // MIB for row in found["theory"]] == [1024, 512]
    points = {(row["batch"], row["format"]): row for row in found["points"]}
    saved = [points[batch, "int8"]["saved_cache"] // MIB for batch in (8, 16, 32, 48)]
    assert saved == [4096, 8192, 16384, 24576]
    assert {row["how"] for row in [*found["points"], *found["theory"]]} == {"computed"}
    assert all(row["saved_total"] is None and row["rest"] is None for row in found["points"])


def test_the_table_for_people_says_the_same(octavo: Run) -> None:
    status, out, err = octavo("memory", "--config", INTERNLM, "--batch-size", "48")
    assert (status, _said(err)) == (0, [])
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in out.splitlines()}
    assert rows["48", "fp16"] == ["13,966", "49,152", "63,118", "computed"]
    assert rows["48", "int8"] == ["13,966", "24,576", "38,542", "24,576", "computed"]
    assert "nothing was measured: there are no weights" in out


@pytest.mark.usefixtures("pretended")
def test_measured_and_computed_rows_stand_side_by_side(octavo: Run) -> None:
    status, out, _ = octavo("memory", "--config", INTERNLM, "--load-format", "dummy", "--batch-size", "8,48")
    assert status == 0
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in out.splitlines()}
    assert rows["8", "int8"] == ["13,966", "4,096", "100", "18,162", "4,096", "4,096", "measured"]
    assert rows["48", "int8"] == ["13,966", "24,576", "–", "38,542", "–", "24,576", "computed"]
    words = " ".join(out.split())
    assert "48 × fp16, 48 × int8: not measured: it needs too much." in words
    assert "filled by the model (50%), then random rows" in words
    assert "Of the rest, 60 MiB are Python" in words


@pytest.mark.usefixtures("pretended")
def test_measured_points_as_json(octavo: Run) -> None:
    status, out, _ = octavo(
        "memory", "--config", INTERNLM, "--load-format", "dummy", "--batch-size", "8,48", "--json"
    )  # progress on stderr
    found = json.loads(out)["points"]
    assert status == 0
    assert [row["how"] for row in found] == ["measured", "measured", "computed", "computed"]
    assert found[1]["saved_total"] == found[1]["saved_cache"] == 4096 * MIB
    assert found[1]["found"]["by_model"] == 8 * 2048 // 2
    assert found[3]["reason"] == "it needs too much"


@pytest.mark.usefixtures("pretended")
def test_the_baseline_of_a_4_bit_model_is_measured_in_its_type(octavo: Run, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64}
    config = {"model_type": "llama", "num_attention_heads": 2, "max_position_embeddings": 128, **sizes}
    four, sixteen = tmp_path / "four", tmp_path / "sixteen"
    write(four, config | {"dtype": "float16", "quantization_config": described("awq", 128)}, {})
    write(sixteen, config | {"dtype": "bfloat16"}, {})
    command = ("memory", four, "--model-format", "awq", "--baseline", sixteen, "--load-format", "dummy", "--json")
    status, out, _ = octavo(*command, "--batch-size", 1, "--context", 64, "--kv", "fp16")
    assert status == 0
    found = {row["kind"]: row["how"] for row in json.loads(out)["points"]}
    assert found == {"fp16": "measured", "int4": "measured"}
    write(sixteen, config | {"num_hidden_layers": 2}, {})
    assert "is not the 16-bit model of a 4-bit MODEL" in octavo(*command)[2]


def test_a_plan_as_json_and_as_a_table(octavo: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "growth.svg"
    command = ("plan", "--config", INTERNLM, "--memory", "80GiB", "--context", 2048)
    found = document(octavo(*command, "--plot", picture, "--json"))
    assert (found["how"], found["memory"], found["context"], found["plot"]) == (
        "computed",
        80 << 30,
        2048,
        str(picture),
    )
    assert [fit["kv"] for fit in found["fits"][:5]] == ["fp16", "kv8", "k8v4", "kv4", "int8"]
    sessions = [fit["sessions"] for fit in found["fits"] if fit["kv"] in ("fp16", "int8")]
    assert sessions == [66, 132, 75, 150]
    assert picture.stat().st_size > 1000
    status, out, _ = octavo(*command, "--reserve", "2GiB")
    rows = [line.split() for line in out.splitlines()]
    assert status == 0
    assert ["fp16", "int8", "13,966", "512", "128", "2.00"] in rows


def test_a_plan_for_the_bundled_model_and_this_machine(octavo: Run) -> None:
    found = document(octavo("plan", "--json"))
    assert found["model"] == "pamphlet"
    assert found["memory"] > 0
    assert found["fits"][0]["kv"] == "bf16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["memory", "--batch-size", "8,x"], "--batch-size"),
        (["memory", "--batch-size", "0"], "--batch-size"),
        (["memory", "--kv", "fp16,int9"], "there is no KV format 'int9'"),
        (["memory", "--context", "4096"], "the model's own reaches from 2 to 2048"),
        (["memory", "--dtype", "int8"], "--dtype int8: choose auto"),
        (["memory", "--model-format", "awq"], "are not quantized: leave --model-format out"),
        (["memory", "--config", "nowhere.json"], "there is no such file"),
        (["memory", "pamphlet", "--config", INTERNLM], "exclude each other"),
        (["plan", "--memory", "80 apples"], "not an amount of memory"),
        (["plan", "--memory", "80"], "'80' has no unit; write 80GiB, 80MiB or 80B"),
        (["plan", "--memory", "1GiB", "--reserve", "1GiB"], "leaves nothing of 1.00 GiB"),
        (["plan", "--plot", "growth.jpg"], "ends with .png, .svg, .pdf"),
        (["plan", "--config", INTERNLM, "--memory", "1GiB", "--plot", "x.png"], "raise --memory"),
    ],
)
def test_wrong_values_are_one_line_and_status_2(octavo: Run, arguments: list[object], words: str) -> None:
    status, out, err = octavo(*arguments)
    assert (status, out) == (2, "")
    [line] = _said(err)
    assert line.startswith("error: ")
    assert words in line


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, octavo.cli.memory, octavo.cli.plan; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_plan_fleet_prints_one_document_with_what_it_assumes(octavo: Run) -> None:
    asked = ("plan", "--config", INTERNLM, "--fleet", "--sessions", 1000, "--context", 2048)
    found = document(octavo(*asked, "--json"))
    assert found["wanted"]["tokens_per_second"] == 1000
    assert found["assumed"]["bandwidth"] == 3.35e12
    assert {row["kv"] for row in found["fleets"]} >= {"fp16", "kv8"}
    status, out, _ = octavo(*asked)
    assert status == 0
    assert "Assumed, not measured" in out


def test_what_a_fleet_is_to_serve_is_refused_without_one(octavo: Run) -> None:
    for asked, named in ((("--sessions", 10), "--sessions"), (("--fleet",), "--sessions")):
        status, _, err = octavo("plan", "--config", INTERNLM, *asked)
        assert status == 2
        assert named in err
