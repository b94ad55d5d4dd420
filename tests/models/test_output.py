"""How strongly output projections read attention's output: found by what they do, in any architecture and any bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from octavo.models.bind import bind
from octavo.models.output import output_norms

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=2, attention_bias=True)


def built(name: str) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """A model, and the weight [output, heads·dim] of each layer's output projection."""
    torch.manual_seed(0)
    if name == "llama":
        hf = LlamaForCausalLM(LLAMA)
        return hf, [layer.self_attn.o_proj.weight for layer in hf.model.layers]
    if name == "gpt2":
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4))
        return hf, [layer.attn.c_proj.weight.T for layer in hf.transformer.h]
    if name == "gpt_neox":
        hf = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=24))
        return hf, [layer.attention.dense.weight for layer in hf.gpt_neox.layers]
    hf = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16))
    return hf, [layer.self_attn.out_proj.weight for layer in hf.model.decoder.layers]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_norms_are_those_of_the_columns_of_the_output_projections_weight(name: str) -> None:
    hf, weights = built(name)
    for norms, weight in zip(output_norms(bind(hf)), weights, strict=True):
        torch.testing.assert_close(norms, weight.detach().norm(dim=0).view(4, 4), atol=1e-6, rtol=1e-5)


class Halved(nn.Module):
    """A projection in a form of its own: what a layer of few bits looks like from outside."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.codes = nn.Buffer((linear.weight.data * 1024).round().to(torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes / 2048).T.to(x.dtype)


def test_a_projection_of_another_class_is_measured_by_what_it_computes() -> None:
    hf, weights = built("llama")
    for layer in hf.model.layers:
        layer.self_attn.o_proj = Halved(layer.self_attn.o_proj)
    for norms, weight in zip(output_norms(bind(hf)), weights, strict=True):
        torch.testing.assert_close(norms, weight.detach().norm(dim=0).view(4, 4) / 2, atol=2e-3, rtol=0)


def test_where_attention_has_no_output_projection_every_channel_counts_the_same() -> None:
    hf, _ = built("llama")
    for layer in hf.model.layers:
        layer.self_attn.o_proj = nn.Identity()
    assert all(torch.equal(norms, torch.ones(4, 4)) for norms in output_norms(bind(hf)))
