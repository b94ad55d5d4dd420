"""What people do with a model whose layers keep states: everything that they do with others."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from octavo import LLM, OctavoError, SamplingParams, artefact
from octavo.cache.session import STATES, SavedSession
from octavo.models.model import BUNDLED, Model
from octavo.plain_sessions import export_session, import_session
from octavo.serve.sessions import SessionDir
from tests.conftest import status_of
from tests.models import zoo

MODELS = ("qwen3_5_text", "granitemoehybrid", "lfm2", "falcon_h1")
SIX = SamplingParams(max_tokens=6, ignore_eos=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*runs without a calibration"),
    pytest.mark.filterwarnings("ignore:.*values in .* are larger"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random hybrid as a directory, with the bundled model's tokenizer."""
    vocabulary = json.loads((BUNDLED / "config.json").read_text())["vocab_size"]

    def make(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"hybrid-{name}"
        if not path.exists():
            zoo.build(name, vocab_size=vocabulary, max_position_embeddings=1024).save_pretrained(path)
            for file in BUNDLED.glob("*token*"):
                shutil.copy(file, path)
        return path

    return make


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, directory: Callable[[str], Path]) -> Model:
    return Model.load(directory(request.param), device="cpu", dtype="float32")


def new(model: Model, kv: str = "kv8", **options: Any) -> LLM:
    return LLM(model, kv, **{"session_len": 512, "max_batch_size": 2} | options)


def test_a_restored_conversation_goes_on_as_the_one_that_stayed(model: Model, text_ids: list[int], tmp_path: Path):
    """It is not prefilled: the file has the states at its end. As plain rows and back too."""
    stayed = new(model)
    answer = stayed.generate(text_ids[:200], SIX)[0]
    said = text_ids[:200] + answer.token_ids
    assert stayed.save(tmp_path / "saved", said) == 192
    expected = stayed.generate(said, SIX)[0]
    assert expected.cached_tokens == 192

    assert export_session(stayed, tmp_path / "saved", tmp_path / "plain.safetensors") == 192
    assert import_session(stayed, tmp_path / "plain.safetensors", tmp_path / "again") == 192
    for name in ("saved", "again"):
        back = new(model)
        assert back.restore(tmp_path / name).cached_tokens == 192
        found = back.generate(said, SIX)[0]
        assert (found.token_ids, found.cached_tokens) == (expected.token_ids, 192)
        back.engine.scheduler.check()
        assert back.engine.pool.states.snapshots.held == 0


def damaged(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A session file whose tensors were changed by one who can write checksums."""
    saved = SavedSession.open(path)
    tensors = load_file(path)
    change(tensors)
    artefact.write(path.with_name("bad"), json.loads(saved.file.header), tensors)
    return path.with_name("bad")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.pop(next(n for n in x if n.startswith(STATES))), "is missing"),
        (lambda x: x.update({"states.9.conv.0": torch.zeros(2)}), "is unknown"),
        (
            lambda x: x.update({n: v[..., :-1].contiguous() for n, v in x.items() if n.startswith(STATES)}),
            "shape or type",
        ),
        (lambda x: x.update({n: v * torch.nan for n, v in x.items() if n.startswith(STATES)}), "not finite"),
    ],
    ids=["missing", "unknown", "shape", "nan"],
)
def test_states_that_are_missing_or_wrong_are_told_in_a_line_and_computed_again(
    change: Callable[[dict[str, torch.Tensor]], None], said: str, directory: Callable[[str], Path], text_ids: list[int],
    tmp_path: Path,
):  # fmt: skip
    model = Model.load(directory("lfm2"), device="cpu", dtype="float32")
    new(model).save(tmp_path / "saved", text_ids[:200])
    back = new(model)
    with pytest.warns(UserWarning, match=f"{said}.*; what it held is computed again"):
        assert back.restore(damaged(tmp_path / "saved", change)).cached_tokens == 192


def test_plain_rows_without_the_states_are_refused(
    directory: Callable[[str], Path], text_ids: list[int], tmp_path: Path
):
    llm = new(Model.load(directory("lfm2"), device="cpu", dtype="float32"))
    llm.save(tmp_path / "saved", text_ids[:200])
    export_session(llm, tmp_path / "saved", tmp_path / "plain")
    with safe_open(tmp_path / "plain", framework="pt") as file:
        about = file.metadata()
    rows = {name: x for name, x in load_file(tmp_path / "plain").items() if not name.startswith(STATES)}
    save_file(rows, tmp_path / "bad", about)
    with pytest.raises(OctavoError, match=r"states\.0\.conv\.0 is missing"):
        import_session(llm, tmp_path / "bad", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_snapshots_are_held_within_a_budget(directory: Callable[[str], Path], pamphlet: Model):
    """Of bytes; a model that keeps no states has none."""
    model = Model.load(directory("lfm2"), device="cpu", dtype="float32")
    one = model.bound.states.nbytes
    assert new(model).cache.states.snapshots == 4, "two for each session"
    llm = new(model, snapshot_memory=5 * one + 1)
    assert llm.cache.states.snapshots == 5
    assert new(model, snapshot_memory=0).cache.nbytes == llm.cache.nbytes - 5 * one
    with pytest.raises(OctavoError, match="keeps no states"):
        new(pamphlet, snapshot_memory="1MiB")


class Direct:
    """The engine's thread, which is this one."""

    def __init__(self, llm: LLM):
        self.llm = llm

    async def call(self, function: Callable[[LLM], Any]) -> Any:
        return function(self.llm)


def test_a_server_puts_back_what_a_prompt_begins_with_as_a_whole(
    directory: Callable[[str], Path], text_ids: list[int], tmp_path: Path
):
    """A file has the states at its end alone: a prompt that leaves it before is computed."""
    model = Model.load(directory("lfm2"), device="cpu", dtype="float32")
    llm, back = new(model), new(model)
    said = text_ids[:200] + llm.generate(text_ids[:200], SIX)[0].token_ids
    kept = SessionDir(tmp_path, 1 << 30, llm)
    kept.remember(said)
    asyncio.run(kept.save(Direct(llm)))  # type: ignore[arg-type]
    there = SessionDir(tmp_path, 1 << 30, back)
    for prompt, restored in ((text_ids[:150] + text_ids[:30], 0), (said + text_ids[:30], 192)):
        asyncio.run(there.restore(Direct(back), prompt))  # type: ignore[arg-type]
        assert there.restored_tokens == restored
    assert back.generate(said + text_ids[:30], SIX)[0].cached_tokens == 192


def run(*arguments: object, status: tuple[int, ...] = (0,)) -> None:
    assert status_of(*arguments) in status


@pytest.mark.slow
def test_every_verb_takes_them(
    directory: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], slowly: Callable[[int], int]
):
    """Calibrate, measure, choose formats, quantize the weights, and serve what comes out."""
    few = ("--calib-dataset", BUNDLED / "evaluation.txt", "--calib-samples", "2", "--calib-seqlen", "96")
    text = ("--text", BUNDLED / "evaluation.txt", "--windows", "2", "--window", "96")
    for name in MODELS[: slowly(len(MODELS))]:
        path, made = directory(name), tmp_path / name
        calibrated = ("--calibration", made / "calibration")
        run("calibrate", path, "--work-dir", made / "calibration", *few)
        for kv in ("int8", "kv8", "k8v4", "kv4"):
            run("generate", path, "--kv", kv, *calibrated, "--prompt", "Once upon a time", "--max-tokens", "4")
        run("accuracy", path, "--kv", "kv8,kv4", *calibrated, *text, "--answers", "0")
        run("doctor", path, "--budget", "5s", status=(0, 1))  # random weights may be advised against, not refused
        assert "refused" not in capsys.readouterr().out
        run("tune", path, "--bits", "6", *calibrated, *text[:-1], "256")
        run("quantize", path, "--work-dir", made / "4bit", *few)
        four = (made / "4bit", "--model-format", "awq")
        run("generate", *four, "--kv", "kv8", "--prompt", "Once", "--max-tokens", "4")
