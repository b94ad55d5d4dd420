"""Saved sessions as plain rows: what attention reads, in a file that anyone can open, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from octavo import LLM, OctavoError, SamplingParams
from octavo.cache.session import SavedSession
from octavo.models.model import Model
from octavo.plain_sessions import export_session, import_session
from octavo.quant.calibration import Calibration
from tests.conftest import status_of

pytestmark = pytest.mark.filterwarnings("ignore:.*runs without a calibration")


def new(model: Model, kv: str, calibration: Calibration) -> LLM:
    return LLM(model, kv, calibration=calibration, session_len=512, max_batch_size=2)


@pytest.mark.parametrize("kv", ["kv8", "kv4", "k8v4", "int4-token-unrotated", "int8", "fp8", "fp32"])
def test_rows_that_were_not_changed_get_their_codes_again(
    kv: str, pamphlet: Model, calibration: Calibration, text_ids: list[int], tmp_path: Path
):
    """And their scales, to the last bit; the restored session answers as the saved one, without a prefill."""
    llm = new(pamphlet, kv, calibration)
    llm.save(tmp_path / "saved", text_ids[:200])
    assert export_session(llm, tmp_path / "saved", tmp_path / "plain.safetensors") == 192
    assert import_session(llm, tmp_path / "plain.safetensors", tmp_path / "again") == 192
    before = SavedSession.open(tmp_path / "saved").codes(llm.cache)
    after = SavedSession.open(tmp_path / "again").codes(llm.cache)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    export_session(llm, tmp_path / "again", tmp_path / "once more.safetensors")
    rows, again = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "once more.safetensors")
    assert all(torch.equal(rows[name], again[name]) for name in rows.keys() | again.keys())

    expected = llm.generate(text_ids[:200], SamplingParams(max_tokens=6))[0].token_ids
    other = new(pamphlet, kv, calibration)
    other.restore(tmp_path / "again")
    answer = other.generate(text_ids[:200], SamplingParams(max_tokens=6))[0]
    assert (answer.token_ids, answer.cached_tokens) == (expected, 192)


def test_the_rows_are_what_the_model_computed(
    pamphlet: Model, calibration: Calibration, text_ids: list[int], tmp_path: Path
):
    """The layout of version 1, and values near those of a cache in float32; page 0 exactly them."""
    rows = {}
    for kv in ("fp32", "kv8"):
        llm = new(pamphlet, kv, calibration)
        llm.save(tmp_path / kv, text_ids[:140])
        export_session(llm, tmp_path / kv, tmp_path / f"{kv}.safetensors")
        rows[kv] = load_file(tmp_path / f"{kv}.safetensors")
    shape = pamphlet.bound.shapes[0]
    assert rows["kv8"]["layers.0.k"].shape == (shape.kv_heads, 128, shape.k_dim)
    assert torch.equal(rows["kv8"]["layers.0.k"][:, :64], rows["fp32"]["layers.0.k"][:, :64])
    error = (rows["kv8"]["layers.0.k"] - rows["fp32"]["layers.0.k"]).norm() / rows["fp32"]["layers.0.k"].norm()
    assert 0 < error < 0.01
    with safe_open(tmp_path / "kv8.safetensors", framework="pt") as file:
        about = file.metadata()
    assert (about["format"], about["version"], about["kv"]) == ("octavo kv rows", "1", "kv8")
    assert json.loads(about["tokens"]) == text_ids[:140]


def test_what_is_no_such_file_is_refused_and_nothing_is_written(
    pamphlet: Model, calibration: Calibration, text_ids: list[int], tmp_path: Path
):
    llm = new(pamphlet, "kv8", calibration)
    llm.save(tmp_path / "saved", text_ids[:140])
    export_session(llm, tmp_path / "saved", tmp_path / "plain")
    rows = load_file(tmp_path / "plain")
    about = {
        "format": "octavo kv rows",
        "version": "1",
        "kv": "kv8",
        "tokens": json.dumps(text_ids[:140]),
        "rows": "128",
    }

    def refused(match: str, changed: dict[str, torch.Tensor], about: dict[str, str] = about) -> None:
        save_file({name: x.contiguous() for name, x in changed.items()}, tmp_path / "bad", about)
        with pytest.raises(OctavoError, match=match):
            import_session(llm, tmp_path / "bad", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("no file of octavo kv rows", rows, about | {"version": "2"})
    refused("layers.1.v is missing", {name: x for name, x in rows.items() if name != "layers.1.v"})
    refused("layers.0.k holds values that are not finite", rows | {"layers.0.k": rows["layers.0.k"] * torch.inf})
    refused("layers.0.v is of shape", rows | {"layers.0.v": rows["layers.0.v"][..., :8]})
    refused("not ids of this model", rows, about | {"tokens": "[-1]"})
    refused("has 2 tokens, and rows of 128", rows, about | {"tokens": "[1, 2]"})
    refused("fewer than a block", {name: x[:, :50] for name, x in rows.items()}, about | {"rows": "50"})
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(OctavoError, match="cannot be read"):
        import_session(llm, tmp_path / "text", tmp_path / "out")


def test_the_commands_take_the_format_from_the_file(
    pamphlet: Model, text_ids: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Out, and in again as another format; what is refused is one line."""
    LLM(pamphlet, "int8-token", session_len=512).save(tmp_path / "saved", text_ids[:100])
    saved, plain, other = (str(tmp_path / name) for name in ("saved", "plain", "other"))
    shape = ("pamphlet", "--dtype", "float32", "--session-len", "512")

    def octavo(*command: str) -> int | str | None:
        return status_of("session", *command, *shape)

    assert octavo("export", saved, plain) == 0
    assert capsys.readouterr().out == f"saved to {plain}: K and V of 64 tokens\n"
    assert octavo("import", plain, other, "--kv", "fp32") == 0
    assert capsys.readouterr().out == f"saved to {other}: codes of 64 tokens\n"
    assert set(SavedSession.open(tmp_path / "other").header.identity.formats) == {"fp32"}
    for command, message in (
        (["export", str(tmp_path / "none"), plain], "there is no such file"),
        (["import", saved, other], "is no file of octavo kv rows"),
    ):
        assert octavo(*command) == 2
        assert message in capsys.readouterr().err
