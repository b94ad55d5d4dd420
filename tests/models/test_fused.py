"""Norms, gates and RoPE of a model in one native pass each: what they compute, and which modules are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.cohere.modeling_cohere import CohereConfig, CohereForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)
from transformers.models.phi.modeling_phi import PhiConfig, PhiForCausalLM

from octavo.models.fused import FusedGate, FusedNorm, fuse
from octavo.weights import cpu
from octavo.weights.linear import PackedLinear
from tests.weights.rounding import rounded

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")


@pytest.mark.parametrize("shape", [(1, 576), (300, 64), (7, 3, 13), (2, 5)], ids=str)
def test_a_norm_is_the_formula_up_to_rounding(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape) * 30, torch.randn(shape[-1])
    exact = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
    assert torch.allclose(cpu.rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-6, atol=1e-7)


def test_a_norm_reads_rows_with_others_between() -> None:
    wide = torch.randn(40, 3, 32)
    assert torch.equal(
        cpu.rms_norm(wide[:, 1], torch.ones(32), 1e-6), cpu.rms_norm(wide[:, 1].clone(), torch.ones(32), 1e-6)
    )


@pytest.mark.parametrize("count", [1, 7, 8, 1000, 70_001])
def test_a_gate_is_the_formula_up_to_rounding(count: int) -> None:
    gate, up = torch.randn(count) * 20, torch.randn(count)
    exact = F.silu(gate.double()) * up.double()
    assert torch.allclose(cpu.silu_gate_(gate.clone(), up).double(), exact, rtol=2e-6, atol=1e-7)


def test_numbers_beyond_the_exponent_are_kept_apart() -> None:
    gate = torch.tensor([float("inf"), float("nan"), -200.0, 200.0, 0.0])
    found = cpu.silu_gate_(gate.clone(), torch.ones(5))
    assert found[0] == float("inf")
    assert found[1].isnan()
    assert abs(found[2]) < 1e-30
    assert found[3] == 200
    assert found[4] == 0


def test_a_rows_bits_do_not_depend_on_its_company() -> None:
    x, weight, up = torch.randn(2000, 96), torch.randn(96), torch.randn(2000, 96)
    norms, gates = cpu.rms_norm(x, weight, 1e-5), cpu.silu_gate_(x.clone(), up)
    for row in (0, 777, 1999):
        assert torch.equal(cpu.rms_norm(x[row : row + 1], weight, 1e-5)[0], norms[row])
        assert torch.equal(cpu.silu_gate_(x[row].clone(), up[row]), gates[row])


def llama() -> nn.Module:
    return LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4))


def four_bits() -> nn.Module:
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4))
    for name, plain in list(mlp.named_children()):
        if isinstance(plain, nn.Linear):
            packed = PackedLinear(plain.in_features, plain.out_features, bias=False, dtype=torch.float32)
            packed.fill(rounded(plain.weight.detach(), 32))
            setattr(mlp, name, packed)
    return mlp


def gemma() -> nn.Module:
    return GemmaMLP(GemmaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4))


class Scaled(LlamaRMSNorm):
    """What has the parts of a norm and computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (LlamaRMSNorm(32), FusedNorm),
        (GemmaRMSNorm(32), FusedNorm),
        (llama(), FusedGate),
        (four_bits(), FusedGate),
        (Scaled(32), None),
        (nn.LayerNorm(32, bias=False), None),
        (gemma(), None),  # its gate is gelu
        (nn.Linear(32, 32), None),
    ],
    ids=[
        "llama's norm",
        "gemma's norm",
        "llama's MLP",
        "llama's MLP in 4 bits",
        "twice a norm",
        "layer norm",
        "gemma's MLP",
        "linear",
    ],
)
def test_what_computes_a_formula_is_taken_over_and_the_rest_is_not(
    module: nn.Module, kind: type[nn.Module] | None
) -> None:
    model = nn.ModuleList([module]).requires_grad_(False)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    width = getattr(module, "hidden_size", 32)
    x, own, parameters = torch.randn(5, width), type(module), dict(model.named_parameters())
    before = module(x)
    undo = list(fuse(model))
    assert len(undo) == (kind is not None)
    if kind is not None:
        assert isinstance(module, kind)
    assert torch.allclose(module(x), before, rtol=1e-4, atol=1e-5)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for back in undo:
        back()
    assert type(module) is own
    assert torch.equal(module(x), before)


def test_in_another_type_a_module_goes_on_as_before() -> None:
    model = nn.ModuleList([LlamaRMSNorm(32), llama()]).requires_grad_(False)
    list(fuse(model))
    model.bfloat16()
    x = torch.randn(5, 32).bfloat16()
    for module in model:
        assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [16, 20, 64, 96])
def test_rope_has_the_bits_of_torchs_own_operations(dim: int) -> None:
    q, k = torch.randn(1, 37, 9, dim).transpose(1, 2), torch.randn(1, 3, 37, dim)
    cos, sin = torch.randn(2, 1, 37, dim)
    for x, expected in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        rows = cpu.rope(x[0].transpose(0, 1), cos[0], sin[0])
        assert torch.equal(rows.transpose(0, 1)[None], expected)


def test_rope_takes_rows_of_any_strides() -> None:
    x, (cos, sin) = torch.randn(16, 5, 7), torch.randn(2, 7, 16)
    rows = x.permute(2, 1, 0)
    assert torch.equal(cpu.rope(rows, cos, sin), cpu.rope(rows.contiguous(), cos, sin))


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model", "rotates"),
    [
        (LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=128, num_key_value_heads=2)), True),
        (PhiForCausalLM(PhiConfig(**SIZES, vocab_size=128, partial_rotary_factor=0.5)), True),  # of half the channels
        (CohereForCausalLM(CohereConfig(**SIZES, vocab_size=128)), False),  # rotates pairs of neighbours
    ],
    ids=["llama", "phi", "cohere"],
)
def test_a_model_with_fused_modules_computes_the_same(model: PreTrainedModel, rotates: bool) -> None:
    model.eval().requires_grad_(False)
    ids = torch.arange(20)[None]
    before = model(ids).logits
    undo = list(fuse(model))
    taken = {type(module).__mro__[1].__name__ for module in model.modules()}
    assert ("FusedRotation" in taken) == rotates
    assert torch.allclose(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert model(ids.expand(2, -1)).logits.shape[0] == 2  # by the model's own code
    assert not any(issubclass(cls, nn.Module) and "Fused" in cls.__name__ for cls in LlamaAttention.__mro__)
    for back in undo:
        back()
    assert torch.equal(model(ids).logits, before)


class Clamped(LlamaMLP):
    """As Step 3.7's: the gate and the other product end at a limit, which rows of the usual size do not reach."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(x)).clamp(max=16)
        return self.down_proj(gate * self.up_proj(x).clamp(-16, 16))


@pytest.mark.parametrize(("kind", "taken"), [(LlamaMLP, True), (Clamped, False)])
def test_a_gate_with_a_limit_is_left_alone(kind: type[LlamaMLP], taken: bool) -> None:
    torch.manual_seed(0)
    mlp = kind(LlamaConfig(hidden_size=64, intermediate_size=96))
    list(fuse(mlp))
    assert isinstance(mlp, FusedGate) == taken
