"""Weights in oneDNN's order: the same products, without a second copy, and never where their rows are read."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from octavo.models import prepack as prepacking
from octavo.models.bind import bind
from octavo.models.load import load_model
from octavo.models.model import BUNDLED, Model
from octavo.models.prepack import PrepackedLinear, prepack
from tests.models import zoo

pytestmark = pytest.mark.skipif(not prepacking.available(), reason="oneDNN has no bf16 product on this processor")


def packed_copy(plain: nn.Linear) -> nn.Linear:
    layer = copy.deepcopy(plain)
    prepacking._pack(layer)
    return layer


def tiny(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, tie_word_embeddings=tied, **sizes)).bfloat16().eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logits(hf: PreTrainedModel) -> Tensor:
    hf.set_attn_implementation("eager")
    with torch.inference_mode():
        return hf(torch.arange(5, 80)[None]).logits


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PrepackedLinear)}


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_plain_layer(bias: bool) -> None:
    plain = nn.Linear(96, 40, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    packed = packed_copy(plain)
    with torch.inference_mode():
        for shape in ((1, 0), (1, 1), (1, 7), (2, 3, 33)):
            x = torch.randn(*shape, 96, dtype=torch.bfloat16)
            torch.testing.assert_close(packed(x), plain(x))
        strided = torch.randn(96, 5, dtype=torch.bfloat16).t()
        torch.testing.assert_close(packed(strided), plain(strided))


def test_the_weight_stays_countable_and_can_be_read_back() -> None:
    plain = nn.Linear(96, 40, dtype=torch.bfloat16)
    packed = packed_copy(plain)
    assert sum(p.nbytes for p in packed.parameters()) == sum(p.nbytes for p in plain.parameters())
    assert torch.equal(packed.weight.to_dense(), plain.weight)


def test_shared_weights_other_dtypes_and_subclasses_stay_plain() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({
        "plain": nn.Linear(32, 32, dtype=torch.bfloat16),
        "wide": nn.Linear(32, 32),
        "own": Own(32, 32, dtype=torch.bfloat16),
        "table": nn.Embedding(32, 32, dtype=torch.bfloat16),
        "head": nn.Linear(32, 32, bias=False, dtype=torch.bfloat16),
    })  # fmt: skip
    model["head"].weight = model["table"].weight
    assert prepacking._layers(model) == [model["plain"]]


def test_a_loaded_model_is_prepacked_and_computes_the_same() -> None:
    model = Model.load(device="cpu", dtype="bfloat16")
    assert isinstance(model.bound.hf.model.layers[0].mlp.up_proj, PrepackedLinear)
    torch.testing.assert_close(logits(model.bound.hf), logits(load_model(BUNDLED, dtype="bfloat16")))


def test_each_old_weight_is_gone_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny()
    old = [weakref.ref(layer.weight) for layer in hf.modules() if type(layer) is nn.Linear]
    pack, alive = prepacking._pack, []

    def watched(layer: nn.Linear) -> None:
        pack(layer)
        alive.append(sum(weight() is not None for weight in old))

    monkeypatch.setattr(prepacking, "_pack", watched)
    Model.of(hf, Path("tiny"))
    assert alive == list(reversed(range(len(old))))


def test_a_layer_of_two_parents_is_packed_once_and_for_both() -> None:
    hf = tiny()
    shared = hf.model.layers[1].mlp.up_proj = hf.model.layers[0].mlp.up_proj
    expected = logits(hf)
    Model.of(hf, Path("tiny"))
    assert isinstance(shared, PrepackedLinear)
    assert hf.model.layers[0].mlp.up_proj is hf.model.layers[1].mlp.up_proj is shared
    torch.testing.assert_close(logits(hf), expected)


def test_a_layer_whose_weight_is_read_in_place_of_its_call_stays_plain() -> None:
    hf = tiny()
    mlp = hf.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(F.silu(F.linear(x, mlp.gate_proj.weight)) * mlp.up_proj(x))
    expected = logits(hf)
    Model.of(hf, Path("tiny"))
    assert type(mlp.gate_proj) is nn.Linear
    assert len(packed_names(hf)) == 14
    torch.testing.assert_close(logits(hf), expected)


def test_a_model_that_reads_a_weight_beside_its_call_stays_plain_altogether() -> None:
    hf = tiny()
    mlp = hf.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x) * mlp.up_proj.weight.float().norm().to(x))
    before, expected = weights(hf), logits(hf)
    Model.of(hf, Path("tiny"))
    assert not packed_names(hf)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(hf).items())
    assert torch.equal(logits(hf), expected)


def test_a_router_that_reads_its_layer_s_weight() -> None:
    hf = zoo.build("longcat_flash").bfloat16()
    expected = logits(hf)
    Model.of(hf, Path("longcat"))
    assert packed_names(hf)
    assert not any("router" in name for name in packed_names(hf))
    torch.testing.assert_close(logits(hf), expected, rtol=0.05, atol=0.05)


def test_a_torch_without_the_operators_leaves_the_model_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacking, "OPERATORS", ("_linear_of_another_torch",))
    bound = bind(tiny())
    prepack(bound)
    assert not packed_names(bound.hf)
