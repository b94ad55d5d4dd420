"""Layers that are given the same rows one after another: one product, with the bits of several."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from octavo.models.bind import bind
from octavo.models.joined import JoinedLinear
from octavo.models.prepack import prepack
from octavo.weights import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")


@pytest.fixture
def hf() -> Qwen2ForCausalLM:
    """A Qwen2, whose q, k and v have biases, as it is loaded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, num_hidden_layers=2, **sizes)).bfloat16().eval()
    prepack(bind(hf))
    hf.set_attn_implementation("eager")
    return hf


def alone(layer: JoinedLinear, x: Tensor) -> Tensor:
    return cpu.multiply_panels(*layer.operand(x)[:2], x.flatten(0, -2), layer.operand(x)[2]).view(*x.shape[:-1], -1)


def projections(hf: Qwen2ForCausalLM) -> list[JoinedLinear]:
    attention = hf.model.layers[1].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def test_q_k_and_v_are_found_and_have_the_bits_of_separate_products(hf: Qwen2ForCausalLM) -> None:
    """In the model's order and in another, for the same rows again, and where one alone is asked."""
    layers = projections(hf)
    assert all(isinstance(layer, JoinedLinear) for layer in layers)
    assert len({id(layer.group) for layer in layers}) == 1
    with torch.inference_mode():
        x, other = torch.randn(1, 7, 64), torch.randn(1, 7, 64)
        for order in ((0, 1, 2), (2, 0, 1), (0, 0, 1), (1,), (2, 1)):
            for rows in (x, other):
                for i in order:
                    assert torch.equal(layers[i](rows), alone(layers[i], rows)), (order, i)


def test_threads_that_share_a_model_do_not_mix_their_rows(hf: Qwen2ForCausalLM) -> None:
    """Four threads, each with rows of its own."""
    layers = projections(hf)

    def run(seed: int) -> bool:
        with torch.inference_mode():
            x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(seed))
            return all(torch.equal(layer(x), alone(layer, x)) for _ in range(50) for layer in layers)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(4)))


def test_a_layer_multiplies_four_times(hf: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven products a layer four are left: q, k and v are one, gate and up another."""
    calls: list[str] = []
    for name in ("multiply_together", "multiply_gated"):
        own = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, own=own, name=name: (calls.append(name), own(*args))[1])
    with torch.inference_mode():
        hf(torch.arange(5)[None])
    assert calls.count("multiply_gated") == 2
    assert calls.count("multiply_together") == 2 * 3 + 1  # and the head
