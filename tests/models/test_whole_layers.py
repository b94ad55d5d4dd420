"""Decoder layers in two native calls: the bits of the model's own code, and which layers are left to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from octavo.models.bind import BoundModel, bind
from octavo.models.model import Model
from octavo.models.whole_layers import WholeLayer
from octavo.weights import cpu
from tests.models import zoo

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")


def tiny() -> Qwen2ForCausalLM:
    """Whose q, k and v have biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, num_hidden_layers=2, initializer_range=0.3, **sizes))
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return hf.eval()


def whole(hf: nn.Module) -> list[WholeLayer]:
    return [module for module in hf.modules() if isinstance(module, WholeLayer)]


def logits(bound: BoundModel, rows: int) -> Tensor:
    ids = torch.tensor(bound.random_tokens(rows))

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * k.sum() + v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    return bound.forward(ids, torch.arange(rows), torch.arange(rows), attend)


OF_THE_FORM = ("llama", "mistral", "qwen2", "qwen3", "granite")  # whose multipliers are 1 here


@pytest.mark.parametrize("kind", [*OF_THE_FORM, "phi3", "gemma2", "olmo2", "phi"])
def test_layers_of_the_form_are_taken_over_and_compute_the_same_bits(kind: str) -> None:
    """And others are left: with norms elsewhere, or fused projections."""
    hf = zoo.build(kind)
    bound = Model.of(hf, Path(kind)).bound
    layers = whole(hf)
    assert len(layers) == (len(bound.layers) if kind in OF_THE_FORM else 0)
    for rows in (1, 3, 40):
        found = logits(bound, rows)
        for layer in layers:
            layer.watchers = [True]
        torch.testing.assert_close(found, logits(bound, rows), rtol=0, atol=0)
        for layer in layers:
            layer.watchers = []


OTHER_ROTATION = ("ernie4_5", "helium", "hunyuan_v1_dense", "ministral3", "smollm3")


@pytest.mark.parametrize("kind", OTHER_ROTATION)
def test_layers_that_rotate_or_scale_q_and_k_otherwise_go_on_as_before(kind: str) -> None:
    """In pairs of neighbours, with norms after it, by the position, or in some layers not at all."""
    bound = bind(zoo.build(kind))
    expected = logits(bound, 40)
    torch.testing.assert_close(logits(Model.of(zoo.build(kind), Path(kind)).bound, 40), expected, rtol=1e-3, atol=1e-4)


def test_q_k_and_v_have_their_biases() -> None:
    hf = tiny()
    Model.of(hf, Path("tiny"))
    x = torch.randn(3, 64)
    for layer in whole(hf):
        found = layer.native.before_attention(x, torch.ones(3, 16), torch.zeros(3, 16))  # turned by nothing
        attention, h = layer.self_attn, layer.input_layernorm(x)
        for side, projection in zip(found, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
            assert torch.equal(side.flatten(1), projection(h))
            assert not torch.equal(projection(0 * h), 0 * side.flatten(1))


def test_a_module_that_is_watched_is_called() -> None:
    hf = tiny()
    bound = Model.of(hf, Path("tiny")).bound
    expected, seen = logits(bound, 7), []
    handle = hf.model.layers[1].mlp.up_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    assert torch.equal(logits(bound, 7), expected)
    assert seen == [(1, 7, 64)]
    handle.remove()
    assert torch.equal(logits(bound, 7), expected)
    assert len(seen) == 1


def scaled(hf: PreTrainedModel) -> None:
    layer = hf.model.layers[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs) * 1.01


def of_another_activation(hf: PreTrainedModel) -> None:
    hf.model.layers[0].mlp.act_fn = nn.GELU()


@pytest.mark.parametrize("change", [scaled, of_another_activation])
def test_a_layer_that_has_the_parts_and_computes_something_else_is_left(
    change: Callable[[PreTrainedModel], None],
) -> None:
    hf = tiny()
    change(hf)
    Model.of(hf, Path("tiny"))
    assert [isinstance(layer, WholeLayer) for layer in hf.model.layers] == [False, True]
