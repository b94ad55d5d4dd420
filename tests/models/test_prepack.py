"""Weights in the processor's order: the same products, without a second copy, and never where their rows are read."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from octavo import LLM, SamplingParams
from octavo.errors import OctavoError
from octavo.models import prepack as prepacking
from octavo.models.bind import bind
from octavo.models.load import load_model
from octavo.models.model import BUNDLED, Model
from octavo.models.packed import parameters, weight_bytes
from octavo.models.prepack import is_prepacked, prepack
from octavo.weights import cpu
from octavo.weights.panels import PanelEmbedding, PanelLinear
from tests.models import zoo

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")


@pytest.fixture(params=["panels", "pairs"])
def pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a processor without products of pairs of bf16 numbers, and on one that has them."""
    if request.param == "pairs" and not cpu.multiplies_pairs():
        pytest.skip("this processor does not multiply pairs of bf16 numbers")
    monkeypatch.setattr(cpu, "multiplies_pairs", lambda: request.param == "pairs")
    return request.param == "pairs"


def packed_alone(plain: nn.Linear, pairs: bool) -> nn.Linear:
    """A layer in panels with the weight of another."""

    class Model(nn.Module):
        pass

    model = Model()
    layer = nn.Linear(plain.in_features, plain.out_features, plain.bias is not None, dtype=torch.bfloat16)
    layer.load_state_dict(plain.state_dict())
    model.layer = layer.requires_grad_(False)
    assert len(list(prepacking.into_panels(model, {layer}, pairs))) == 1
    assert type(layer) is PanelLinear
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
    return {name for name, module in model.named_modules() if isinstance(module, PanelLinear)}


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_plain_layer(bias: bool, pairs: bool) -> None:
    """Of any leading dimensions and strides, also without a row."""
    plain = nn.Linear(96, 40, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    packed = packed_alone(plain, pairs)
    with torch.inference_mode():
        for shape in ((1, 0), (1, 1), (1, 7), (2, 3, 33)):
            x = torch.randn(*shape, 96, dtype=torch.bfloat16)
            torch.testing.assert_close(packed(x), plain(x))
        strided = torch.randn(96, 5, dtype=torch.bfloat16).t()
        torch.testing.assert_close(packed(strided), plain(strided))


def test_the_weight_stays_countable_and_is_put_back_whole(pairs: bool) -> None:
    """What a model does not bear is undone to the bit."""
    hf = tiny(tied=True)
    before, size, count = weights(hf), weight_bytes(hf), parameters(hf)

    def refused(called: set[nn.Module]) -> object:
        yield from prepacking.into_panels(hf, called, pairs)
        assert (weight_bytes(hf), parameters(hf)) == (size, count)
        yield from prepacking.retype(hf, torch.float32)
        hf.lm_head.forward = None

    bound = bind(hf)
    assert not prepacking.attempt(bound, "stays plain", refused, prepacking.SAME)
    assert bound.slower[0].startswith("stays plain: rearranged, it failed with TypeError")
    assert not packed_names(hf)
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    after = weights(hf)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)


def test_a_rearrangement_that_fails_midway_is_put_back_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log, and for the doctor; of a model that is taken as it can be nothing is said."""
    assert Model.of(tiny(), Path("tiny")).bound.slower == []
    hf, pack, calls = tiny(), cpu.pack_panels, []

    def fails_later(weight: Tensor, pairs: bool) -> Tensor:
        calls.append(weight)
        if len(calls) > 1:
            raise RuntimeError("no memory")
        return pack(weight, pairs)

    before = weights(hf)
    monkeypatch.setattr(cpu, "pack_panels", fails_later)
    model = Model.of(hf, Path("tiny"))
    assert not packed_names(hf)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(hf).items())
    assert model.bound.slower == [f"{prepacking.OWN_ORDER}: rearranged, it failed with RuntimeError: no memory"]
    assert "no memory" in caplog.text


def test_a_loaded_model_is_prepacked_and_computes_the_same(pairs: bool) -> None:
    """With its type named, so that activations are bf16 either way."""
    model = Model.load(device="cpu", dtype="bfloat16")
    assert isinstance(model.bound.hf.model.layers[0].mlp.up_proj, PanelLinear)
    assert cpu.in_pairs(model.bound.hf.lm_head.weight) == pairs
    assert model.bound.computes == model.bound.dtype == torch.bfloat16
    expected = logits(load_model(BUNDLED, dtype="bfloat16")).float()
    assert (logits(model.bound.hf) - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.usefixtures("pairs")
def test_each_old_weight_is_gone_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight at a time is there twice."""
    hf = tiny()
    old = [weakref.ref(layer.weight) for layer in hf.modules() if type(layer) is nn.Linear]
    replace, alive = prepacking.replace_weights, []

    def watched(modules: list[nn.Module], *rest: object) -> object:
        undo = replace(modules, *rest)
        if isinstance(modules[0], nn.Linear):
            alive.append(sum(weight() is not None for weight in old))
        return undo

    monkeypatch.setattr(prepacking, "replace_weights", watched)
    Model.of(hf, Path("tiny"))
    assert alive == list(reversed(range(len(old))))


@pytest.mark.usefixtures("pairs")
def test_a_layer_of_two_parents_is_packed_once_and_for_both() -> None:
    hf = tiny()
    shared = hf.model.layers[1].mlp.up_proj = hf.model.layers[0].mlp.up_proj
    expected = logits(hf)
    Model.of(hf, Path("tiny"), computing=hf.dtype)
    assert isinstance(shared, PanelLinear)
    assert hf.model.layers[0].mlp.up_proj is hf.model.layers[1].mlp.up_proj is shared
    torch.testing.assert_close(logits(hf), expected, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("pairs")
def test_a_layer_whose_weight_is_read_in_place_of_its_call_stays_plain() -> None:
    hf = tiny()
    mlp = hf.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(F.silu(F.linear(x, mlp.gate_proj.weight)) * mlp.up_proj(x))
    expected = logits(hf)
    Model.of(hf, Path("tiny"), computing=hf.dtype)
    assert type(mlp.gate_proj) is nn.Linear
    assert len(packed_names(hf)) == 14
    torch.testing.assert_close(logits(hf), expected, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("pairs")
def test_a_model_that_reads_a_weight_beside_its_call_stays_plain_altogether() -> None:
    hf = tiny()
    mlp = hf.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x) * mlp.up_proj.weight[0].float().norm().to(x))
    before, expected = weights(hf), logits(hf)
    Model.of(hf, Path("tiny"), computing=hf.dtype)
    assert not packed_names(hf)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(hf).items())
    assert torch.equal(logits(hf), expected)


@pytest.mark.usefixtures("pairs")
def test_a_router_that_reads_its_layer_s_weight() -> None:
    hf = zoo.build("longcat_flash").bfloat16()
    expected = logits(hf)
    Model.of(hf, Path("longcat"), computing=hf.dtype)
    assert packed_names(hf)
    assert not any("router" in name for name in packed_names(hf))
    torch.testing.assert_close(logits(hf), expected, rtol=0.05, atol=0.05)


@pytest.fixture
def no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products of pairs of bf16 numbers, which round what they are given."""
    monkeypatch.setattr(cpu, "multiplies_pairs", lambda: False)


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("tied", [False, True])
def test_16_bit_weights_compute_in_float32_where_nobody_says_otherwise(tied: bool) -> None:
    """Weights of linear layers and embeddings keep their bits and bytes; what is computed is what float32 weights of
    the same values compute."""
    hf, size = tiny(tied), weight_bytes(tiny(tied))
    plain = tiny(tied).float()
    bound = Model.of(hf, Path("tiny")).bound
    assert (bound.dtype, bound.computes, str(bound.raw_format)) == (torch.bfloat16, torch.float32, "bf16")
    assert "bfloat16 computed in float32" in bound.arithmetic
    embedding, head, norm = hf.model.embed_tokens, hf.lm_head, hf.model.norm
    assert embedding.weight.dtype == head.weight.dtype == torch.bfloat16
    assert isinstance(embedding, PanelEmbedding) == tied == (embedding.weight is head.weight)
    assert norm.weight.dtype == torch.float32
    norms = sum(p.numel() for name, p in plain.named_parameters() if "norm" in name)
    assert weight_bytes(hf) == size + 2 * norms
    assert parameters(hf) == parameters(plain)
    torch.testing.assert_close(logits(hf), logits(plain))


def test_what_would_double_the_model_is_computed_in_its_own_type() -> None:
    """Most weights of a mixture of experts are in no linear layer: they stay in 16 bits, and so does what they meet."""
    hf = zoo.build("qwen3_moe").bfloat16()
    bound = Model.of(hf, Path("moe")).bound
    assert bound.computes == torch.bfloat16
    assert packed_names(hf)


@pytest.mark.usefixtures("no_pairs")
def test_an_embedding_s_own_forward_is_kept() -> None:
    """Gemma scales its embedding, whose weight is the head's."""
    hf, plain = zoo.build("gemma3_text").bfloat16(), zoo.build("gemma3_text").bfloat16().float()
    bound = Model.of(hf, Path("gemma")).bound
    assert bound.computes == torch.float32
    assert isinstance(hf.get_input_embeddings(), PanelEmbedding)
    torch.testing.assert_close(logits(hf), logits(plain), rtol=0.02, atol=0.02)  # the scale is rounded to 16 bits


def test_a_named_type_is_computed_in() -> None:
    """--dtype is obeyed for weights and activations."""
    for dtype in (torch.float32, torch.float16):
        bound = Model.load(device="cpu", dtype=str(dtype).removeprefix("torch.")).bound
        assert (bound.dtype, bound.computes) == (dtype, dtype)
        assert bound.hf.lm_head.weight.dtype == bound.hf.model.norm.weight.dtype == dtype
        assert is_prepacked(bound.hf)


def test_without_pairs_products_are_float32_on_every_processor() -> None:
    """As `octavo tune` measures: rounding to bf16 would hide what one side of one layer loses."""
    model = Model.load(device="cpu", computing=torch.float32, pairs=False)
    assert is_prepacked(model.bound.hf)
    assert not prepacking.rounds_rows(model.bound.hf)


def test_deterministic_takes_float32_products_on_every_processor() -> None:
    """An answer's log-probabilities are the same bits alone and among others."""
    model = Model.load(device="cpu", deterministic=True)
    assert not cpu.in_pairs(model.bound.hf.lm_head.weight)
    llm = LLM(model, session_len=256, prefix_caching=False)
    prompts = [list(range(first, first + length)) for first, length in ((5, 3), (20, 70), (100, 41), (7, 1))]
    params = SamplingParams(max_tokens=8, logprobs=0, ignore_eos=True)
    together = llm.generate(prompts, params)
    for prompt, among in zip(prompts, together, strict=True):
        alone = llm.generate([prompt], params)[0]
        assert alone.token_ids == among.token_ids
        assert alone.sampled == among.sampled


def test_deterministic_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native kernels, on other devices, and spread over several."""
    monkeypatch.setattr(cpu, "unavailable", lambda: "the native extension is not built")
    with pytest.raises(OctavoError, match="native kernels"):
        Model.load(device="cpu", deterministic=True)
    with pytest.raises(OctavoError, match="device map"):
        Model.load(device_map="auto", deterministic=True)


def test_deterministic_is_refused_to_a_model_with_products_of_its_own() -> None:
    """Experts in one tensor are multiplied by torch, whose sums depend on how many rows an expert is given."""
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    bound = bind(Qwen3MoeForCausalLM(config).bfloat16())
    with pytest.raises(OctavoError, match="has products beside those of its linear layers"):
        prepack(bound, deterministic=True)
