"""The comparison with peers: the GGUF file holds the same model, and whoever computes another is not reported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

gguf = pytest.importorskip("gguf", reason="needs the peers extra")

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.1,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


@pytest.fixture(autouse=True)
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import peers_cpu

    return peers_cpu


@pytest.fixture(scope="module")
def hf() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(copy.deepcopy(CONFIG), dtype=torch.bfloat16).eval()


def test_the_gguf_file_holds_the_weights(benchmark: Any, hf: LlamaForCausalLM, tmp_path: Path) -> None:
    from llama_gguf import gguf_name, interleaved

    benchmark.write_gguf(hf, tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    weights = hf.state_dict()
    assert set(found) == {gguf_name(name) for name in weights}
    for name, weight in weights.items():
        data = torch.from_numpy(found[gguf_name(name)].data.copy())
        rows = data.view(torch.bfloat16) if data.dtype == torch.uint8 else data
        expected = interleaved(weight, 16) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight
        assert torch.equal(rows.float(), expected.float()), name
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    assert reader.get_field("llama.rope.freq_base").contents() == 10000.0


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_gguf_file_holds_the_4_bit_weights(
    benchmark: Any, hf: LlamaForCausalLM, tmp_path: Path, group_size: int
) -> None:
    from llama_gguf import gguf_name, interleaved
    from weights_peers_cpu import pack

    packed = copy.deepcopy(hf)
    packed.model.layers[0].mlp.down_proj = packed.model.layers[1].mlp.down_proj = torch.nn.Identity()  # 96 inputs
    weights = pack(packed, group_size)
    assert len(weights) == 2 * 6
    benchmark.write_gguf(packed, tmp_path / "tiny.gguf", weights)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    for name, weight in weights.items():
        tensor = found[gguf_name(name)]
        rows = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        expected = weight.dequantize()
        assert torch.equal(packed.get_submodule(name).decode(0, len(expected), torch.float32), expected), name
        error = (expected - hf.get_submodule(name).weight.float()).abs()
        assert (error <= 0.51 * weight.scales.float().repeat_interleave(group_size, 1)).all(), name
        if name.endswith(("q_proj", "k_proj")):
            expected = interleaved(expected, 16)
        assert torch.equal(rows, expected), name


def test_rotating_neighbours_of_interleaved_rows_gives_the_same_scores() -> None:
    from llama_gguf import interleaved

    x = torch.randn(1, 9, 64)
    weights = torch.randn(2, 2 * 16, 64)
    rope = LlamaRotaryEmbedding(CONFIG)
    cos, sin = rope(x, torch.arange(9)[None])

    def heads(weight: Tensor) -> Tensor:
        return (x @ weight.T).unflatten(-1, (2, 16)).transpose(1, 2)

    q, k = apply_rotary_pos_emb(*(heads(weight) for weight in weights), cos, sin)
    angles = torch.polar(torch.ones(9, 8), torch.outer(torch.arange(9.0), rope.inv_freq))
    pairs = [torch.view_as_complex(heads(interleaved(w, 16)).unflatten(-1, (8, 2))) * angles for w in weights]
    scores = (pairs[0] @ pairs[1].conj().mT).real
    torch.testing.assert_close(scores, q @ k.mT, rtol=1e-4, atol=1e-3)


def test_contestants_agree_with_the_model_and_strangers_end_the_comparison(
    benchmark: Any, hf: LlamaForCausalLM
) -> None:
    from contestants import Octavo, Transformers
    from random_llama import calibrated, served

    model = served(copy.deepcopy(hf))
    ours = {kv: Octavo(model, calibrated(model), kv, 1, 128) for kv in ("bf16", "int8", "int8-token")}
    exact = copy.deepcopy(hf).float()
    assert max(benchmark.errors({**ours, "transformers": Transformers(hf, quantized=False)}, exact).values()) < 0.05

    stranger = copy.deepcopy(hf)
    stranger.model.layers[1].self_attn.k_proj.weight.data.neg_()
    with pytest.raises(SystemExit, match="stranger: not the same model"):
        benchmark.errors({**ours, "stranger": Transformers(stranger, quantized=False)}, exact)


def test_formats_and_transformers_decode_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    import engine_cpu

    monkeypatch.setattr(engine_cpu, "FORMATS", ("bf16", "kv8"))
    monkeypatch.setattr(engine_cpu, "PAIRS", (("kv8", "bf16"),))
    row = engine_cpu.measure(None, None, batch=2, context=70, steps=6, transformers=True)
    assert set(row["step_ms"]) == {"transformers' forward", "bf16", "kv8"}
    assert all(value > 0 for value in (*row["step_ms"].values(), *row["prefill_tokens_per_second"].values()))
    low, middle, high = row["pairs"][0]["quartiles"]
    assert low <= middle <= high
