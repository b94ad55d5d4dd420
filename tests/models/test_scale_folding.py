"""Folds: which layers share an input, what can absorb a scale of it, and that the model stays the same when it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from octavo.models.scale_folding import Fold, absorb, find_folds

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}


def build(kind: type[PreTrainedModel], config: type, **more: object) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**{**SIZES, **more})).eval().requires_grad_(False)
        for parameter in model.parameters():  # norms of 1 and biases of 0 would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def runner(model: PreTrainedModel, seed: int = 0) -> Callable[[], Tensor]:
    ids = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(seed))
    return lambda: model(ids, use_cache=False).logits


def linear(model: PreTrainedModel) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def named(model: PreTrainedModel) -> dict[str, str | None]:
    """What absorbs a scale of the first block's layers, by their last names."""
    folds = find_folds(model, linear(model), runner(model))
    first = [fold for fold in folds if ".0." in fold.layers[0]]
    return {
        " ".join(name.rpartition(".")[2] for name in fold.layers): fold.source and fold.source.rpartition(".")[2]
        for fold in first
    }


def llama(**more: object) -> PreTrainedModel:
    return build(LlamaForCausalLM, LlamaConfig, intermediate_size=48, **more)


def gemma() -> PreTrainedModel:
    return build(GemmaForCausalLM, GemmaConfig, intermediate_size=48, num_key_value_heads=4, head_dim=8)


def opt() -> PreTrainedModel:
    return build(OPTForCausalLM, OPTConfig, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3)


def test_a_llama_folds_into_norms_and_up_and_into_v_where_every_head_has_its_own() -> None:
    expected = {
        "q_proj k_proj v_proj": "input_layernorm",
        "o_proj": "v_proj",
        "gate_proj up_proj": "post_attention_layernorm",
        "down_proj": "up_proj",
    }
    assert named(llama(num_key_value_heads=4)) == expected
    assert named(llama(num_key_value_heads=2)) == expected | {"o_proj": None}


def test_a_gelu_absorbs_no_scale_and_a_norm_that_feeds_a_residual_of_two_branches_does() -> None:
    falcon = build(FalconForCausalLM, FalconConfig, new_decoder_architecture=False, parallel_attn=True, bias=True)
    assert named(falcon) == {
        "query_key_value dense_h_to_4h": "input_layernorm",
        "dense": None,
        "dense_4h_to_h": None,
    }


def test_a_relu_passes_a_scale_on() -> None:
    assert named(opt())["fc2"] == "fc1"


def test_a_router_that_takes_the_same_input_forbids_a_scale() -> None:
    moe = build(
        Qwen2MoeForCausalLM, Qwen2MoeConfig, intermediate_size=48, moe_intermediate_size=16, num_key_value_heads=4,
        shared_expert_intermediate_size=48, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1,
    )  # fmt: skip
    found = named(moe)
    assert found["q_proj k_proj v_proj"] == "input_layernorm"
    assert all(source is None for names, source in found.items() if "gate_proj" in names)


def test_a_layer_that_was_not_reached_forbids_scales_of_its_width() -> None:
    model = llama(num_key_value_heads=4)
    model.unused = nn.Linear(48, 8)
    assert named(model)["down_proj"] is None
    assert named(model)["o_proj"] == "v_proj"


@pytest.mark.parametrize("make", [llama, gemma, opt])
def test_what_is_absorbed_leaves_the_model_the_same(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    layers = linear(model)
    folds = [fold for fold in find_folds(model, layers, runner(model)) if fold.source is not None]
    assert len(folds) >= 4
    run = runner(model, seed=1)
    before = run()
    for fold in folds:
        scale = torch.empty(layers[fold.layers[0]].in_features).uniform_(0.3, 3)
        absorb(model.get_submodule(str(fold.source)), scale)
        for name in fold.layers:
            layers[name].weight.mul_(scale)
    torch.testing.assert_close(run(), before, rtol=1e-3, atol=1e-4)


def test_a_kind_is_the_same_in_every_block() -> None:
    assert (
        Fold(("layers.3.q", "layers.3.k"), "layers.3.norm").kind
        == Fold(("layers.11.q", "layers.11.k"), "layers.11.norm").kind
    )
