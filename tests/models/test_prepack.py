"""Weights in oneDNN's order: the same products, without a second copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.models.load import load_model
from octavo.models.model import BUNDLED, Model
from octavo.models.prepack import PrepackedLinear, prepack

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bf16 product on this processor",
)


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_plain_layer(bias: bool) -> None:
    plain = nn.Linear(96, 40, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    packed = PrepackedLinear(plain)
    with torch.inference_mode():
        for shape in ((1, 0), (1, 1), (1, 7), (2, 3, 33)):
            x = torch.randn(*shape, 96, dtype=torch.bfloat16)
            torch.testing.assert_close(packed(x), plain(x))
        strided = torch.randn(96, 5, dtype=torch.bfloat16).t()
        torch.testing.assert_close(packed(strided), plain(strided))


def test_the_weight_stays_countable_and_can_be_read_back() -> None:
    plain = nn.Linear(96, 40, dtype=torch.bfloat16)
    packed = PrepackedLinear(plain)
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
    prepack(model)
    assert [name for name, child in model.items() if isinstance(child, PrepackedLinear)] == ["plain"]


def test_a_loaded_model_is_prepacked_and_computes_the_same() -> None:
    ids = torch.arange(5, 80)
    model = Model.load(device="cpu", dtype="bfloat16")
    plain = load_model(BUNDLED, dtype="bfloat16")
    assert isinstance(model.bound.hf.model.layers[0].mlp.up_proj, PrepackedLinear)
    model.bound.hf.set_attn_implementation("sdpa")
    with torch.inference_mode():
        torch.testing.assert_close(model.bound.hf(ids[None]).logits, plain(ids[None]).logits)
