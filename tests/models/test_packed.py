"""Checkpoints with 4-bit weights against the same models with the weights that those stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
)

from octavo.errors import OctavoError, Unsupported
from octavo.measure.memory.costs import weight_kinds
from octavo.models.geometry import Geometry
from octavo.models.load import load_model
from octavo.models.packed import packed_layers
from tests.models import test_internlm as internlm
from tests.models.forms import MIXTURES, mixture, sorted_columns
from tests.weights.rounding import LAYOUTS, described, packed, write

IDS = torch.tensor([[1, 5, 9, 2, 7, 30, 11]])
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
GROUP = 32


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model.eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def checkpoint(
    path: Path, architecture: str, name: str, change: Any = None, said: dict[str, Any] | None = None, **files: Any
) -> Tensor:
    """Write a checkpoint and return the logits of the model it stands for."""
    model = build(architecture)
    tied = {"lm_head.weight"} if architecture == "qwen2" else set()
    tensors = {key: value for key, value in model.state_dict().items() if key not in tied}
    stored, meant = packed(tensors, name, GROUP)
    if change is not None:
        change(stored)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    config["quantization_config"] = described(name, GROUP) if said is None else said
    write(path, config, stored, **files)
    model.load_state_dict(meant, strict=False)
    return model(IDS).logits


def close(found: Tensor, expected: Tensor) -> None:
    """Activations have 15 bits of their group's largest value."""
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_packed_model_is_the_one_its_weights_stand_for(name: str, kind: str, tmp_path: Path):
    expected = checkpoint(tmp_path, kind, name)
    model = load_model(tmp_path)
    close(model(IDS).logits, expected)
    assert len(packed_layers(model)) == 14
    assert isinstance(model, Qwen2ForCausalLM if kind == "qwen2" else LlamaForCausalLM)
    assert not any("_proj.weight" in key for key in model.state_dict())


@pytest.mark.parametrize(("shards", "kind"), [(3, "safetensors"), (1, "bin"), (3, "bin")])
def test_files_of_any_kind_hold_them(shards: int, kind: str, tmp_path: Path):
    expected = checkpoint(tmp_path, "llama", "awq", shards=shards, kind=kind)
    close(load_model(tmp_path, model_format="awq")(IDS).logits, expected)


def test_bf16_activations_give_logits_within_their_rounding(tmp_path: Path):
    expected = checkpoint(tmp_path, "llama", "awq")
    found = load_model(tmp_path, dtype="bf16")(IDS).logits.float()
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_internlm_with_biases_in_its_first_generation(tmp_path: Path):
    stored, meant = packed(internlm.checkpoint_v1(bias=True), "awq", 16)
    said = {"quantization_config": described("awq", 16)}
    own = load_model(write(tmp_path / "4", internlm.V1 | said, stored, 2, "bin"), model_format="awq")
    close(own(IDS).logits, load_model(write(tmp_path / "16", internlm.V1, meant))(IDS).logits)
    assert own.model.layers[0].self_attn.o_proj.bias is not None


def test_internlm2_with_fused_projections(tmp_path: Path):
    ends = ("wqkv.weight", "wo.weight", "w1.weight", "w2.weight", "w3.weight")
    stored, meant = packed(internlm.checkpoint_v2(kv_heads=2, bias=True), "awq", 16, ends)
    config = internlm.V2 | {"bias": True}
    own = load_model(write(tmp_path / "4", config | {"quantization_config": described("awq", 16)}, stored))
    close(own(IDS).logits, load_model(write(tmp_path / "16", config, meant))(IDS).logits)


@pytest.mark.parametrize("file", ["quant_config.json", "quantize_config.json"])
def test_settings_beside_the_config_as_the_first_tools_wrote_them(file: str, tmp_path: Path):
    name = "awq" if file == "quant_config.json" else "gptq"
    old = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
    said = old if name == "awq" else {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    expected = checkpoint(tmp_path, "llama", name)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / file).write_text(json.dumps(said))
    close(load_model(tmp_path)(IDS).logits, expected)


def test_what_gptq_tools_leave_behind_is_no_alarm(tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96)
        tensors["model.layers.0.mlp.up_proj.g_idx"] = (torch.arange(64) // GROUP).int()

    expected = checkpoint(tmp_path, "llama", "gptq", change)
    close(load_model(tmp_path)(IDS).logits, expected)


def test_layers_left_in_16_bits_stay_as_they_are(tmp_path: Path):
    torch.manual_seed(0)
    model = build("llama")
    stored, meant = packed(dict(model.state_dict()), "awq", GROUP, ("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    said = described("awq", GROUP) | {"modules_to_not_convert": ["o_proj", "mlp"]}
    write(tmp_path, model.config.to_dict() | {"quantization_config": said}, stored)
    model.load_state_dict(meant)
    own = load_model(tmp_path)
    close(own(IDS).logits, model(IDS).logits)
    assert len(packed_layers(own)) == 6
    assert Geometry.trace(tmp_path).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed symmetric"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_with_packed_experts_is_the_one_its_weights_stand_for(kind: str, name: str, tmp_path: Path):
    model = mixture(kind, name, tmp_path)
    own = load_model(tmp_path)
    close(own(IDS).logits, model(IDS).logits)
    assert len(packed_layers(own)) == 2 * (4 + 3 * 4)


def test_columns_in_the_order_of_their_importance_are_sorted_once(tmp_path: Path):
    """GPTQ with desc_act: the columns of a group lie anywhere."""
    model = sorted_columns(tmp_path)
    close(load_model(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed symmetric"])
def test_a_tied_model_whose_head_is_quantized_has_a_head_of_its_own(name: str, tmp_path: Path):
    model = build("qwen2")
    stored, meant = packed(dict(model.state_dict()), name, GROUP, ("_proj.weight", "lm_head.weight"))
    said = described(name, GROUP) | {"lm_head": True, "ignore": []}
    write(tmp_path, model.config.to_dict() | {"dtype": "float32", "quantization_config": said}, stored)
    model.config.tie_word_embeddings = False
    untied = type(model)(model.config).eval()
    untied.load_state_dict(meant)
    own = load_model(tmp_path)
    close(own(IDS).logits, untied(IDS).logits)
    assert "lm_head" in packed_layers(own)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("name", ["gptq", "compressed"])
def test_a_tied_head_that_only_the_config_calls_quantized_stays_tied(name: str, load_format: str, tmp_path: Path):
    said = described(name, GROUP) | {"lm_head": True, "ignore": []}
    expected = checkpoint(tmp_path, "qwen2", name, said=said)
    own = load_model(tmp_path, load_format=load_format)
    assert own.lm_head.weight is own.model.embed_tokens.weight
    assert len(packed_layers(own)) == 14
    if load_format == "auto":
        close(own(IDS).logits, expected)


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: Tensor) -> Any:
    return lambda tensors: tensors.update({name: value})


AT = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("awq", drop(f"{AT}.qweight"), f"lack {AT}.qweight"),
        ("awq", drop(f"{AT}.qzeros"), f"lack {AT}.qzeros"),
        ("gptq", drop(f"{AT}.scales"), f"lack {AT}.scales"),
        ("awq", lambda t: [t.pop(f"{AT}.{x}") for x in ("qweight", "qzeros", "scales")], f"lack {AT}.qweight"),
        ("awq", put(f"{AT}.scales", torch.ones(4, 32)), r"\(4, 32\) instead of \(2, 32\)"),
        ("awq", put(f"{AT}.qweight", torch.ones(64, 4)), f"{AT}.qweight is torch.float32"),
        ("awq", put(f"{AT}.scales", torch.full((2, 32), torch.inf)), f"scales of {AT} are not all finite"),
        ("awq", put("model.layers.9.mlp.up_proj.qweight", torch.ones(1)), "model.layers.9.mlp.up_proj is quantized"),
        ("awq", put("extra", torch.ones(1)), "unknown to the model, extra"),
        ("awq", drop("model.norm.weight"), r"lack model\.norm\.weight"),
        ("gptq", put(f"{AT}.g_idx", torch.arange(64) // 16), f"{AT}.g_idx does not put 32 columns into each group"),
        ("gptq", put("model.layers.0.mlp.up_proj.bias", torch.ones(96)), r"unknown to the model, \S+up_proj.bias"),
        ("compressed", put(f"{AT}.weight_shape", torch.tensor([1, 2])), f"{AT}.weight_shape says"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(layout: str, change: Any, message: str, tmp_path: Path):
    checkpoint(tmp_path, "llama", layout, change)
    with pytest.raises(OctavoError, match=message):
        load_model(tmp_path)


def test_a_group_size_that_does_not_divide_is_named(tmp_path: Path):
    checkpoint(tmp_path, "llama", "awq", said=described("awq", 48))
    with pytest.raises(OctavoError, match=r"q_proj has 64 inputs, which groups of 48 do not divide"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "fp8"}, "quantized with fp8"),
        (described("awq", 32) | {"version": "gemv"}, "version gemv"),
        (described("awq", 32) | {"bits": 8}, "bits 8"),
        (described("awq", 32) | {"group_size": 24}, "groups of 24"),
        (described("gptq", 32) | {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        (described("compressed", 32) | {"format": "int-quantized"}, "format int-quantized"),
        (described("compressed", 32) | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (described("compressed", 32) | {"config_groups": {}}, "number of config_groups 0"),
        (described("compressed", 32) | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config True"),
        (described("compressed", 32) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
)
def test_other_ways_to_quantize_are_refused_by_name(said: dict[str, Any], message: str, tmp_path: Path):
    write(tmp_path, {**build("llama").config.to_dict(), "quantization_config": said}, {})
    with pytest.raises(Unsupported, match=message):
        load_model(tmp_path)


def test_asking_for_awq_of_other_weights_is_an_error(tmp_path: Path):
    checkpoint(tmp_path, "llama", "gptq")
    with pytest.raises(OctavoError, match="are quantized with gptq: leave --model-format out"):
        load_model(tmp_path, model_format="awq")
    build("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(OctavoError, match="are not quantized: leave --model-format out"):
        load_model(tmp_path / "plain", model_format="awq")


def test_random_weights_of_a_quantized_config(tmp_path: Path):
    checkpoint(tmp_path, "llama", "awq")
    (tmp_path / "model.safetensors").unlink()
    one, two = (load_model(tmp_path, load_format="dummy")(IDS).logits for _ in range(2))
    assert torch.equal(one, two)
    assert one.isfinite().all()


def test_random_weights_have_no_biases_of_chance(tmp_path: Path):
    config = Qwen2Config(**SIZES).to_dict() | {"quantization_config": described("awq", GROUP)}
    layers = packed_layers(load_model(write(tmp_path, config, {}), load_format="dummy")).values()
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) == 6
    assert not any(bias.any() for bias in biases)


def test_a_device_map_is_refused(tmp_path: Path):
    checkpoint(tmp_path, "llama", "awq")
    with pytest.raises(Unsupported, match="leave the device map out"):
        load_model(tmp_path, device_map="auto")


def test_sizes_in_4_bits_are_those_of_layers_that_can_be_packed(tmp_path: Path):
    config = LlamaConfig(**SIZES | {"hidden_size": 128, "intermediate_size": 192}).to_dict()
    geometry = Geometry.trace(write(tmp_path / "some", config, {}))
    attention, gate_and_up = 2 * 128 * 128 + 2 * 64 * 128, 2 * 192 * 128
    assert geometry.linear == 2 * (attention + gate_and_up + 192 * 128)
    assert geometry.group == 64, "groups of 128 do not divide down_proj's 192 inputs"
    assert "int4" in weight_kinds(geometry)
    sizes = SIZES | {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "head_dim": 32}
    experts = Geometry.trace(write(tmp_path / "experts", Qwen3MoeConfig(**sizes).to_dict(), {}))
    assert experts.linear == 2 * attention
    uneven = LlamaConfig(**SIZES | {"hidden_size": 48, "intermediate_size": 80}).to_dict()
    none = Geometry.trace(write(tmp_path / "none", uneven, {}))
    assert none.linear == 0
    assert list(weight_kinds(none)) == ["fp32"]


def test_packed_weights_take_little_more_than_a_quarter_of_16_bits(tmp_path: Path):
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 512}
    config = {**LlamaConfig(**sizes).to_dict(), "dtype": "bfloat16"}
    geometry = Geometry.trace(write(tmp_path / "16", config, {}))
    own = Geometry.trace(write(tmp_path / "4", config | {"quantization_config": described("awq", 128)}, {}))
    assert own.linear == geometry.linear
    assert own.weights - (geometry.weights - 2 * geometry.linear) <= 0.27 * 2 * geometry.linear
    loaded = load_model(tmp_path / "4", load_format="dummy")
    held = sum(
        x.nbytes for x in [*loaded.parameters(), *(b for p in packed_layers(loaded).values() for b in p.buffers())]
    )
    assert held == own.weights, "what is computed is what is held"
