"""Other projects' scales: read from files as their sources write them, written so that they come back unchanged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import octavo
from octavo.cli import main
from octavo.errors import OctavoError
from octavo.models.model import BUNDLED, Model
from octavo.quant.calibration import Calibration
from octavo.scales import FORMATS, export_scales, import_scales, read_scales
from tests.conftest import observe, status_of

LAYERS, HEADS, DIM = 3, 2, 8
CHANNELS = HEADS * DIM


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a checkpoint."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(path)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copyfile(file, path / file.name)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    hf = AutoModelForCausalLM.from_pretrained(directory)
    made = Model.of(hf, directory)
    made.synthetic = False
    return made


@pytest.fixture(scope="module")
def calibration(model: Model) -> Calibration:
    return observe(model.bound, model.bound.random_tokens(200), model.fingerprint)


def random_scales(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(*shape, generator=generator) + 0.01 for _ in range(2 * LAYERS)]


def checkpoint(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


SPELLINGS = (
    ("model.layers.{i}.self_attn.k_scale", "model.layers.{i}.self_attn.v_scale"),
    ("model.layers.{i}.self_attn.attn.k_scale", "model.layers.{i}.self_attn.attn.v_scale"),
    ("model.layers.{i}.self_attn.k_proj.k_scale", "model.layers.{i}.self_attn.v_proj.v_scale"),
    ("model.layers.{i}.self_attn.qkv_proj.k_scale", "model.layers.{i}.self_attn.qkv_proj.v_scale"),
    ("backbone.layers.{i}.mixer.k_proj.k_scale", "backbone.layers.{i}.mixer.v_proj.v_scale"),
    ("model.layers.{i}.self_attn.k_proj.output_scale", "model.layers.{i}.self_attn.v_proj.output_scale"),
    ("model.layers.{i}.self_attn.k_cache.scale", "model.layers.{i}.self_attn.v_cache.scale"),
)


@pytest.mark.parametrize("names", SPELLINGS, ids=lambda names: names[0].partition("{i}.")[2])
def test_every_spelling_that_vllm_reads_is_read(names: tuple[str, str], model: Model, tmp_path: Path):
    scales = random_scales(1)
    tensors = {names[j].format(i=i): scales[2 * i + j] for i in range(LAYERS) for j in range(2)}
    made = import_scales(checkpoint(tmp_path, tensors), "vllm", model)
    for i in range(LAYERS):
        for j, side in enumerate("kv"):
            expected = 448 * scales[2 * i + j].expand(HEADS, DIM)
            torch.testing.assert_close(made.layers[i][side]["max"], expected)
            assert torch.equal(made.layers[i][side]["min"], -made.layers[i][side]["max"])
    assert made.header.granularity == "tensor"


@pytest.mark.parametrize(
    "name", ["model.layers.{i}.self_attn.kv_scale", "transformer.layers.{i}.attention.kv_cache_scaling_factor"]
)
def test_one_scale_may_stand_for_k_and_v(name: str, model: Model, tmp_path: Path):
    scales = random_scales(1)
    made = import_scales(checkpoint(tmp_path, {name.format(i=i): scales[i] for i in range(LAYERS)}), "vllm", model)
    assert torch.equal(made.layers[1]["k"]["max"], made.layers[1]["v"]["max"])
    assert made.layers[1]["k"]["scale"][0, 0] == scales[1]


def test_scales_of_heads_of_int8_and_affine_ones(model: Model, tmp_path: Path):
    """(heads, 1, 1) as compressed-tensors has them; its int8; ModelOpt's bias of each channel."""
    scales = random_scales(HEADS, 1, 1)
    names = [name for i in range(LAYERS) for name in (SPELLINGS[0][0].format(i=i), SPELLINGS[0][1].format(i=i))]
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "attn_head", "dynamic": False}}
    path = checkpoint(tmp_path / "a", dict(zip(names, scales, strict=True)), quantization_config=scheme)
    made = import_scales(path, "compressed-tensors", model)
    assert made.header.granularity == "head"
    torch.testing.assert_close(made.layers[0]["v"]["max"], 127.5 * scales[1][:, :, 0].expand(HEADS, DIM))

    names = [f"model.layers.{i}.self_attn.{side}_proj.{side}_scale" for i in range(LAYERS) for side in "kv"]
    scalars, biases = random_scales(1), random_scales(CHANNELS)
    tensors = dict(zip(names, scalars, strict=True))
    tensors |= {name.replace("_scale", "_bias"): bias for name, bias in zip(names, biases, strict=True)}
    made = import_scales(checkpoint(tmp_path / "b", tensors), "modelopt", model)
    middle = (made.layers[2]["k"]["max"] + made.layers[2]["k"]["min"]) / 2
    torch.testing.assert_close(middle, biases[4].view(HEADS, DIM), atol=1e-4, rtol=1e-4)


def test_lmdeploys_statistics_and_its_binary_files(model: Model, tmp_path: Path):
    """As its calibration saved them (float16 by module name), and as kv_qparams wrote them for two ranks."""
    low, high = -torch.rand(LAYERS, HEADS, DIM).half(), torch.rand(LAYERS, HEADS, DIM).half()
    for name in ("key_stats.pth", "value_stats.pth"):
        kept = {f"model.layers.{i}": x for i, x in enumerate(high)}, {f"model.layers.{i}": x for i, x in enumerate(low)}
        torch.save({"max": kept[0], "min": kept[1], "absmax": kept[0]}, tmp_path / name)
    made = import_scales(tmp_path, "lmdeploy", model)
    assert torch.equal(made.layers[1]["v"]["min"], low[1].float())
    assert made.header.granularity == "channel"

    for i in range(LAYERS):
        for rank in range(2):
            numbers = torch.tensor([0.02 + rank, 0.5, 0.03, -0.25])
            (tmp_path / f"layers.{i}.past_kv_scale.{rank}.weight").write_bytes(numbers.numpy().tobytes())
    made = import_scales(tmp_path, "turbomind", model)
    assert made.header.granularity == "head"
    torch.testing.assert_close(made.layers[0]["k"]["max"][:, 0], torch.tensor([0.5 + 127.5 * 0.02, 0.5 + 127.5 * 1.02]))
    torch.testing.assert_close(made.layers[0]["v"]["min"][1, 0], torch.tensor(-0.25 - 127.5 * 0.03))


def test_jsons_as_their_projects_write_them(model: Model, tmp_path: Path):
    values = [x.tolist() for x in random_scales(CHANNELS)]
    document = {
        "scales": {"k_scales": values[:LAYERS], "v_scales": values[LAYERS:]},
        "qmax": 128.0,
        "layer_ids": [2, 0, 1],
    }
    file = tmp_path / "kv_scales.json"
    file.write_text(json.dumps({"model": document}))
    made = import_scales(file, "onnxruntime-genai", model)
    torch.testing.assert_close(made.layers[2]["k"]["max"].flatten(), 128 * torch.tensor(values[0]))
    assert made.header.granularity == "channel"

    scales = {"0": {str(i): 0.02 * (i + 1) for i in range(LAYERS)}}
    file.write_text(
        json.dumps({"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": scales}})
    )
    made = import_scales(file, "sglang", model)
    torch.testing.assert_close(made.layers[2]["v"]["max"], torch.full((HEADS, DIM), 448 * 0.06))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("llm-compressor", "vllm")])
@pytest.mark.parametrize("granularity", [None, "head"])
def test_what_is_exported_comes_back_and_goes_out_again_unchanged(
    name: str, granularity: Any, model: Model, calibration: Calibration, tmp_path: Path
):
    """Exported, imported and exported again: the same numbers to the last bit."""
    if granularity is not None and granularity not in FORMATS[name].granularities:
        with pytest.raises(OctavoError, match=f"{name} holds scales per .*, not per head"):
            export_scales(tmp_path / "out", name, model, calibration, granularity)
        return
    assert export_scales(tmp_path / "first", name, model, calibration, granularity)
    made = import_scales(tmp_path / "first", name, model)
    made.save(tmp_path)
    export_scales(tmp_path / "second", name, model, Calibration.load(tmp_path), granularity)
    again = import_scales(tmp_path / "second", name, model)
    for before, after in zip(made.layers, again.layers, strict=True):
        for side in "kv":
            assert before[side].keys() == after[side].keys()
            assert all(torch.equal(before[side][key], after[side][key]) for key in before[side])
    seen = calibration.layers[0]["k"]
    assert bool((made.layers[0]["k"]["max"].amax() >= 0.999 * seen["max"].amax()).all()), "the range shrank"


def test_the_imported_ranges_serve_int8_and_say_what_kv8_lacks(model: Model, calibration: Calibration, tmp_path: Path):
    export_scales(tmp_path / "scales.json", "onnxruntime-genai", model, calibration, headroom=1.4)
    made = import_scales(tmp_path / "scales.json", "onnxruntime-genai", model)
    llm = octavo.LLM(model, kv="int8", calibration=made, prefix_caching=False)
    assert llm.cache.plans[0].k is not None
    with pytest.raises(OctavoError, match=r"ranges of K and V and not the queries.*octavo calibrate"):
        octavo.LLM(model, kv="kv8", calibration=made)


def test_a_checkpoint_with_scales_is_one_that_transformers_loads(
    model: Model, calibration: Calibration, directory: Path, tmp_path: Path
):
    """Weights are the same files; the scales are where compressed-tensors looks for them."""
    export_scales(tmp_path / "new", "compressed-tensors", model, calibration)
    assert (tmp_path / "new" / "model-weights.safetensors").samefile(directory / "model.safetensors")
    config = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
    }  # fmt: skip
    pytest.importorskip("compressed_tensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    scales = read_scales(tmp_path / "new", "compressed-tensors")
    for i, layer in enumerate(loaded.model.layers):
        for side in ("k", "v"):
            assert getattr(layer.self_attn, f"{side}_scale").item() == scales[i][side].scale.item()
    with torch.no_grad():
        logits = loaded(torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all()


def broken(path: Path, change: Any, count: int = LAYERS) -> Path:
    scales = random_scales(1)
    tensors = {SPELLINGS[0][j].format(i=i): scales[2 * (i % LAYERS) + j] for i in range(count) for j in range(2)}
    change(tensors)
    return checkpoint(path, tensors)


def put(name: str, value: Any) -> Any:
    return lambda tensors: tensors.update({name: torch.tensor(value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.v_scale"), "the V scale of layer 1 is missing"),
        (put("model.layers.2.self_attn.k_scale", [float("nan")]), "the K scale of layer 2 is not a finite number"),
        (put("model.layers.2.self_attn.k_scale", [-0.5]), "the K scale of layer 2 is -0.5: scales are above 0"),
        (put("model.layers.0.self_attn.v_scale", [0.1] * 6), "the V scale of layer 0 is of shape .* 2 KV heads of 8"),
        (put("model.layers.3.self_attn.v_scale", [0.1]), "has scales of layer 3, and the model has 3 layers"),
        (lambda t: [t.update({name: torch.ones(1)}) for name in t], "all scales are exactly 1.0"),
        (lambda t: [t.pop(name) for name in list(t)[:]] and t.update(x=torch.ones(1)), "holds no scales"),
        (put("model.layers.2.self_attn.k_zero_point", [3]), "k_zero_point is not 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_models_scales_is_one_sentence_and_nothing_is_kept(
    change: Any, message: str, model: Model, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = broken(tmp_path / "scales", change)
    with pytest.raises(OctavoError, match=message):
        import_scales(path, "vllm", model)
    with pytest.raises(SystemExit):
        main(["scales", "import", str(path), str(directory), "--as", "vllm", "--work-dir", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_another_kind_is_one_sentence(name: str, model: Model, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "scales.json").write_text('{"scales": 3}')
    for path in (tmp_path, tmp_path / "scales.json", tmp_path / "nowhere"):
        with pytest.raises(OctavoError) as refusal:
            import_scales(path, name, model)
        assert "\n" not in str(refusal.value)


def test_the_commands_import_export_and_show(
    calibration: Calibration, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """PATH, then MODEL; a calibration that is there is not replaced unasked."""
    calibration.save(tmp_path)
    scales, name = str(tmp_path / "scales.json"), str(directory)
    main_ends(["scales", "export", scales, name, "--as", "onnxruntime-genai", "--calibration", str(tmp_path)])
    assert "kv_cache_scale_file" in capsys.readouterr().out
    main_ends(["scales", "import", scales, name, "--as", "onnxruntime-genai", "--work-dir", str(tmp_path)], 2)
    assert "--replace" in capsys.readouterr().err
    main_ends(["scales", "import", scales, name, "--as", "onnxruntime-genai", "--work-dir", str(tmp_path / "new")])
    assert Calibration.load(tmp_path / "new").header.granularity == "channel"
    main_ends(["scales", "show", scales, "--as", "onnxruntime-genai"])
    assert "Scales" in capsys.readouterr().out


def main_ends(words: list[str], status: int = 0) -> None:
    assert status_of(*words) == status
