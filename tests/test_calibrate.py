"""Calibration end to end: what is observed, where windows are placed, and what is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from octavo.calibrate import calibrate, calibration_for
from octavo.calibrate.positions import shift_invariant, window_offsets
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.models.model import Model
from octavo.quant.calibration import FILE_NAME, SYNTHETIC, Calibration
from octavo.quant.format import KVFormat
from tests.conftest import status_of

INT4 = KVFormat.parse("int4-token")
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tiny(hf: PreTrainedModel | None = None, **config: object) -> Model:
    torch.manual_seed(0)
    hf = hf or LlamaForCausalLM(LlamaConfig(**{**LLAMA, **config}))
    return Model.of(hf, Path("tiny"))


def windows(count: int, length: int) -> list[list[int]]:
    return torch.randint(96, (count, length), generator=torch.Generator().manual_seed(1)).tolist()


def keys_and_values(model: Model, window: list[int], offset: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What transformers' own cache holds of a window placed at `offset`: K, V [tokens, kv_heads, dim] by layer."""
    hf = model.bound.hf
    hf.set_attn_implementation("eager")
    positions = torch.arange(len(window))[None] + offset
    with torch.inference_mode():
        cache = hf(input_ids=torch.tensor([window]), position_ids=positions, use_cache=True).past_key_values
    hf.set_attn_implementation("octavo")
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]


def test_statistics_are_those_of_the_rows_in_transformers_own_cache() -> None:
    model = tiny()
    texts = windows(3, 256)  # as long as the context: every offset is 0
    calibration = calibrate(model, texts, dataset="random")
    rows = [keys_and_values(model, text, 0) for text in texts]
    for i, sides in enumerate(calibration.layers):
        for side, name in enumerate("kv"):
            seen = torch.cat([row[i][side] for row in rows])
            torch.testing.assert_close(sides[name]["min"], seen.amin(0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sides[name]["max"], seen.amax(0), atol=1e-5, rtol=1e-5)
            body = torch.cat([row[i][side][64:] for row in rows])  # a window's first page has outliers of its own
            torch.testing.assert_close(sides[name]["mean"], body.mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(sides[name]["std"], body.std(0, correction=0), atol=1e-5, rtol=1e-4)


def test_readers_are_the_queries_and_the_output_projections_weights() -> None:
    torch.manual_seed(0)
    state = LlamaForCausalLM(LlamaConfig(**LLAMA)).state_dict()
    layers = []
    for times in (1, 2):  # in the second model the queries of layer 0 are twice as long
        hf = LlamaForCausalLM(LlamaConfig(**LLAMA))
        hf.load_state_dict(state)
        hf.model.layers[0].self_attn.q_proj.weight.data *= times
        layers.append(calibrate(tiny(hf), windows(1, 256), dataset="random").layers)
    torch.testing.assert_close(layers[1][0]["k"]["reader"], 2 * layers[0][0]["k"]["reader"], atol=1e-5, rtol=1e-4)
    weight = state["model.layers.1.self_attn.o_proj.weight"]  # [hidden, heads·dim]; two heads read a KV head
    norms = weight.square().sum(0).view(2, 2, 8).sum(1).sqrt()
    torch.testing.assert_close(layers[0][1]["v"]["reader"], norms, atol=1e-6, rtol=1e-5)


def test_windows_are_spread_over_the_whole_context_most_of_them_near_its_beginning() -> None:
    model = tiny(max_position_embeddings=4096)
    offsets = sorted(window_offsets(model.bound, 9, 64, seed=0))
    assert (offsets[0], offsets[-1]) == (0, 4096 - 64)
    gaps = [b - a for a, b in itertools.pairwise(offsets)]
    assert gaps == sorted(gaps)
    assert offsets[4] < 4096 / 5


def test_windows_cover_keys_at_every_position() -> None:
    model = tiny()
    text = windows(1, 32)[0]
    calibration = calibrate(model, [text] * 15, dataset="random")
    assert calibration.header.positions == (0, 255)
    far_keys = keys_and_values(model, text, 224)[1][0]
    reached = calibration.layers[1]["k"]
    assert (far_keys >= reached["min"] - 1e-4).all()
    assert (far_keys <= reached["max"] + 1e-4).all()
    near_only = calibrate(model, [text], dataset="random").layers[1]["k"]
    assert (far_keys > near_only["max"] + 1e-2).any(), "one window at position 0 would have been enough"


def test_a_model_with_learned_positions_is_calibrated_at_position_0_only() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=256, n_embd=32, n_layer=2, n_head=4))
    model = tiny(gpt2)
    assert not shift_invariant(model.bound, 100)
    assert calibrate(model, windows(4, 32), dataset="random").header.positions == (0, 31)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_recognized_as_relative_in_any_dtype(dtype: torch.dtype) -> None:
    assert shift_invariant(tiny(LlamaForCausalLM(LlamaConfig(**LLAMA)).to(dtype)).bound, 200)


def test_progress_and_header_say_what_was_measured() -> None:
    seen: list[tuple[int, ...]] = []
    header = calibrate(
        tiny(), windows(3, 16), dataset="random", headroom=2.0, progress=lambda *done: seen.append(done)
    ).header
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (header.samples, header.seqlen, header.tokens, header.headroom) == (3, 16, 48, 2.0)
    assert header.fingerprint == SYNTHETIC


def test_activations_that_are_not_finite_name_the_layer_and_the_sample() -> None:
    model = tiny()
    model.bound.hf.model.layers[1].self_attn.v_proj.weight.data[0, 0] = math.inf
    with pytest.raises(OctavoError, match=r"V of layer 1 is not finite in sample 0.*--dtype"):
        calibrate(model, windows(1, 16), dataset="random")


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "nothing to calibrate on"), ([[1, 2, 3], [1, 2]], "of one length"), ([[1] * 300], "context is 256")],
)
def test_windows_that_do_not_fit_are_refused(texts: list[list[int]], message: str) -> None:
    with pytest.raises(OctavoError, match=message):
        calibrate(tiny(), texts, dataset="random")


@pytest.mark.parametrize(("name", "value"), [("granularity", "block"), ("headroom", 0.0)])
def test_impossible_defaults_are_refused_before_anything_runs(name: str, value: object) -> None:
    with pytest.raises(OctavoError, match=name):
        calibrate(tiny(), windows(1, 16), dataset="random", **{name: value})  # type: ignore[arg-type]


class TestBeforeServing:
    """Formats with 4-bit keys get a short calibration first; others are served without one, and say what it costs."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)

    def test_it_is_told_made_once_and_kept_where_calibrate_keeps_it(
        self, pamphlet: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[tuple[int, int]] = []
        with pytest.warns(UserWarning, match="int4-token needs a calibration.*octavo calibrate pamphlet"):
            made = calibration_for(pamphlet, None, INT4, lambda *step: steps.append(step))
        assert made is not None
        assert steps == [(i, 8) for i in range(1, 9)]
        assert made.header.positions[1] == pamphlet.bound.max_context - 1
        assert (pamphlet.work_dir / FILE_NAME).is_file()
        monkeypatch.setattr("octavo.calibrate.serving.calibrate", None)
        found = calibration_for(pamphlet, None, INT4)
        assert found is not None
        assert found.header == made.header

    def test_where_it_would_take_too_long_the_command_is_named_and_nothing_is_kept(
        self, pamphlet: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("octavo.calibrate.serving.PATIENCE", 0.0)
        with (
            pytest.warns(UserWarning, match="needs a"),
            pytest.raises(OctavoError, match=r"octavo calibrate pamphlet .*--kv kv8"),
        ):
            calibration_for(pamphlet, None, INT4)
        assert not (pamphlet.work_dir / FILE_NAME).exists()

    def test_keys_of_8_bits_are_served_without_and_say_in_a_line_what_that_costs(self, pamphlet: Model) -> None:
        with pytest.warns(UserWarning, match="int8-token runs without a calibration.*octavo calibrate pamphlet"):
            llm = LLM(pamphlet, "int8-token", session_len=128, max_batch_size=1)
        assert llm.calibration is None
        assert not (pamphlet.work_dir / FILE_NAME).exists()

    def test_random_weights_are_calibrated_on_random_tokens_and_nothing_is_kept(self, tmp_path: Path) -> None:
        model = tiny()
        with pytest.warns(UserWarning, match="needs a calibration"):
            made = calibration_for(model, None, INT4)
        assert made is not None
        assert made.header.fingerprint == SYNTHETIC
        assert not list(tmp_path.rglob(FILE_NAME))


class TestCommand:
    """`octavo calibrate` on the bundled model."""

    def run(self, *arguments: str) -> int:
        return status_of("calibrate", *arguments)

    def test_a_text_file_gives_an_artefact_that_serves(self, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
        text = tmp_path / "text.txt"
        text.write_text("The sheet is folded three times and becomes eight leaves. " * 200)
        arguments = ["--calib-dataset", str(text), "--calib-samples", "4", "--calib-seqlen", "128"]
        assert self.run("pamphlet", *arguments, "--work-dir", str(tmp_path)) == 0
        out = capsys.readouterr().out
        assert "Ranges of K and V" in out
        assert "4 windows of 128 tokens of text.txt" in out
        assert out.splitlines()[-1] == f"next: octavo chat pamphlet --kv kv8 --calibration {tmp_path}"
        header = Calibration.load(tmp_path).header
        assert (header.samples, header.seqlen, header.granularity) == (4, 128, "channel")

    def test_the_pages_command_line_works_when_pasted(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        (tmp_path / "ptb.train.txt").write_text("the sheet is folded three times and becomes eight leaves \n" * 2000)
        page = "lite calibrate pamphlet --calib-dataset ptb --calib-samples 4 --calib-seqlen 128"
        assert status_of(*page.split(), "--work-dir", tmp_path, "--data-dir", tmp_path) == 0
        assert Calibration.load(tmp_path).header.dataset == "ptb (ptb.train.txt)"

    def test_random_weights_are_observed_on_one_random_batch_and_say_so(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        assert self.run("pamphlet", "--load-format", "dummy", "--calib-seqlen", "64", "--work-dir", str(tmp_path)) == 0
        header = Calibration.load(tmp_path).header
        assert header.fingerprint == SYNTHETIC
        assert "synthetic" in header.dataset

    def test_self_calibration_needs_no_data(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        arguments = ["--calib-samples", "4", "--calib-seqlen", "32", "--work-dir", str(tmp_path)]
        assert self.run("pamphlet", *arguments) == 0
        assert Calibration.load(tmp_path).header.tokens == 128

    def test_a_text_too_short_is_one_line_with_the_numbers_and_leaves_no_file(self, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
        text = tmp_path / "short.txt"
        text.write_text("Too short.")
        assert self.run("pamphlet", "--calib-dataset", str(text), "--work-dir", str(tmp_path / "out")) == 2
        error = capsys.readouterr().err
        assert "error: " in error
        assert "--calib-samples or --calib-seqlen" in error
        assert "Traceback" not in error
        assert not (tmp_path / "out" / FILE_NAME).exists()

    def test_a_data_set_nobody_knows_is_refused_before_anything_is_made(self, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
        assert self.run("pamphlet", "--calib-dataset", "nope.txt", "--work-dir", str(tmp_path / "out")) == 2
        assert "nope.txt" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_work_dir_that_cannot_be_written_fails_before_the_work(self, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
        (tmp_path / "file").touch()
        assert self.run("pamphlet", "--work-dir", str(tmp_path / "file" / "x")) == 2
        assert "--work-dir" in capsys.readouterr().err
