"""How many sessions fit: the arithmetic, and the picture of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.errors import OctavoError
from octavo.measure.memory.costs import Cost, costs, int4_bits, weight_kinds
from octavo.measure.report.picture import draw_growth
from octavo.models.geometry import Geometry
from octavo.models.model import BUNDLED
from octavo.quant.format import KVFormat

INTERNLM = Path(__file__).parents[3] / "benchmarks" / "geometries" / "internlm-chat-7b.json"
FORMATS = [KVFormat.parse(name) for name in ("fp16", "int8", "int4-token")]
GIB = 1 << 30


@pytest.fixture(scope="module")
def internlm() -> Geometry:
    return Geometry.trace(INTERNLM)


def fits(geometry: Geometry, formats: list[KVFormat], context: int, memory: int) -> list[Cost]:
    """Each format with each kind of weights."""
    return costs(geometry, formats, context, memory, list(weight_kinds(geometry)))


def test_sessions_of_internlm_chat_7b_on_80_gib(internlm: Geometry) -> None:
    found = {(fit.weights, fit.format): fit.sessions for fit in fits(internlm, FORMATS, 2048, 80 * GIB)}
    assert found == {
        ("fp16", "fp16"): 66, ("fp16", "int8"): 132, ("fp16", "int4-token"): 261,
        ("int4", "fp16"): 75, ("int4", "int8"): 150, ("int4", "int4-token"): 296,
    }  # fmt: skip


def test_one_session_more_would_not_fit(internlm: Geometry) -> None:
    for fit in fits(internlm, FORMATS, 2048, 80 * GIB):
        assert fit.total(fit.sessions) <= 80 * GIB < fit.total(fit.sessions + 1)


def test_4_bit_weights_keep_embeddings_norms_biases_and_the_head(internlm: Geometry) -> None:
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    kept = 2 * 103168 * 4096 + 32 * (4 * 4096 + 2 * 4096) + 4096
    assert internlm.linear == 32 * layer
    kinds = weight_kinds(internlm)
    assert kinds == {"fp16": 2 * (32 * layer + kept), "int4": 32 * layer * 67 // 128 + 2 * kept}
    assert pytest.approx(67 / 16) == int4_bits(128)


def test_groups_are_those_that_divide_the_most_weights(tmp_path: Path) -> None:
    """SmolLM2's layers of 576 inputs take groups of 64."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = Geometry.trace(tmp_path / "config.json", "bf16")
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert (found.group, found.linear) == (64, 2 * layer)
    assert weight_kinds(found)["int4"] == found.weights - 2 * 2 * layer + round(2 * layer * (4 + 24 / 64) / 8)


def test_a_tied_head_is_an_embedding() -> None:
    pamphlet = Geometry.trace(BUNDLED)
    assert weight_kinds(pamphlet)["int4"] > 2 * 4096 * 384, "the one matrix of both stays in 16 bits"


def test_weights_that_do_not_fit_leave_no_session(internlm: Geometry) -> None:
    found = {(fit.weights, fit.format): fit.sessions for fit in fits(internlm, FORMATS, 2048, 8 * GIB)}
    assert found["fp16", "int8"] == 0
    assert found["int4", "int8"] == (8 * GIB - weight_kinds(internlm)["int4"]) // (512 << 20)


@pytest.mark.parametrize("name", ["growth.png", "growth.svg"])
def test_the_picture_names_every_line_and_its_sessions(internlm: Geometry, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    draw_growth(fits(internlm, FORMATS[:2], 2048, 80 * GIB), 80 * GIB, 2048, "internlm-chat-7b", path)
    if path.suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    text = path.read_text()
    for words in ("66 sessions", "75 sessions", "132 sessions", "150 sessions", "GiB", "internlm-chat-7b"):
        assert words in text


def test_pictures_that_cannot_be_drawn_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    fit, none = (Cost("fp16", 0, FORMATS[0], 0, 1, 0, sessions) for sessions in (10, 0))
    with pytest.raises(OctavoError, match=r"\.png, \.svg, \.pdf"):
        draw_growth([fit], 10, 64, "x", tmp_path / "growth.jpg")
    with pytest.raises(OctavoError, match="raise --memory"):
        draw_growth([none], 10, 64, "x", tmp_path / "growth.png")
    with pytest.raises(OctavoError, match="cannot be written: No such file"):
        draw_growth([fit], 10, 64, "x", tmp_path / "nowhere" / "growth.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(OctavoError, match=r"pip install .*report"):
        draw_growth([fit], 10, 64, "x", tmp_path / "growth.png")
