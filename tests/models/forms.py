"""The forms in which a model can be given, each as a tiny one on disk beside the transformers model that it stands for.

`measure` loads a form as Octavo does and reads a text through the fp32 cache; the reference is transformers' own eager
attention over the weights that the form stands for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from octavo.cache.size import CacheSize
from octavo.engine.reading import Reading
from octavo.models.bind import bind
from octavo.models.load import load_model
from octavo.quant.format import KVFormat
from octavo.weights.layouts import Int4Weight
from tests.models import zoo
from tests.weights.rounding import PACKED, described, packed, rounded, write

HEADS, KV_HEADS, GROUP = 4, 2, 32
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
    "initializer_range": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6, "dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
GGUF_KINDS = ("F16", "BF16", "Q8_0", "Q4_1", "Q4_K", "Q6_K", "Q4_0")
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.layers.": "blk.",
}  # fmt: skip
IDS = torch.arange(40) * 7 % 60


@dataclass(frozen=True)
class Measured:
    """Of a form: whether greedy tokens are those of eager, how far log-probabilities are off, bytes of a token."""

    tokens: bool
    error: float
    token_bytes: int


def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES)).float().eval()


def directory(path: Path) -> PreTrainedModel:
    model = llama()
    model.save_pretrained(path)
    return model


def bin_shards(path: Path) -> PreTrainedModel:
    model = llama()
    write(path, model.config.to_dict(), dict(model.state_dict()), 3, "bin")
    return model


def lora(path: Path) -> PreTrainedModel:
    """An adapter of rank 4 beside its base."""
    model = llama()
    model.save_pretrained(path.parent / "base")
    tensors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, layer in model.named_modules():
            if name.endswith(("q_proj", "down_proj")):
                a, b = torch.randn(4, layer.in_features) / 8, torch.randn(layer.out_features, 4) / 8
                tensors |= {f"base_model.model.{name}.lora_{x}.weight": y for x, y in (("A", a), ("B", b))}
                layer.weight.data += 8 / 4 * b @ a
    path.mkdir()
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "../base", "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(said))
    save_file(tensors, path / "adapter_model.safetensors")
    return model


def vision_language(path: Path) -> PreTrainedModel:
    model = zoo.build("gemma3")
    model.save_pretrained(path)
    return model


def four_bits(name: str, path: Path) -> PreTrainedModel:
    model = llama()
    stored, meant = packed(dict(model.state_dict()), name, GROUP)
    write(path, model.config.to_dict() | {"quantization_config": described(name, GROUP)}, stored)
    model.load_state_dict(meant)
    return model


def mixture(kind: str, layout: str, path: Path, **sizes: Any) -> PreTrainedModel:
    """Experts in 4 bits, a tensor for each as the checkpoints of that model type have them."""
    config = CONFIG_MAPPING[kind](**SIZES | MIXTURES[kind] | {"intermediate_size": 32} | sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    tensors = {}
    for key, tensor in model.state_dict().items():
        block, _, last = key.rpartition(".")
        if tensor.dim() < 3:
            tensors[key] = tensor
        for expert, matrix in enumerate(tensor if tensor.dim() == 3 else ()):
            halves = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            parts = halves if "up" in last else {last: matrix}
            tensors |= {f"{block}.{expert}.{part}.weight": x for part, x in parts.items()}
    stored, meant = packed(tensors, layout, GROUP)
    if kind == "mixtral":
        names = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for ours, theirs in names.items():
            stored = {
                key.replace(ours, theirs) if ".mlp." in key or "moe" in key else key: x for key, x in stored.items()
            }
    write(path, config.to_dict() | {"dtype": "float32", "quantization_config": described(layout, GROUP)}, stored)
    for key, tensor in model.state_dict().items():
        block, _, last = key.rpartition(".")
        if tensor.dim() < 3:
            tensor.copy_(meant[key])
        for expert, matrix in enumerate(tensor if tensor.dim() == 3 else ()):
            parts = ["gate_proj", "up_proj"] if "up" in last else [last]
            matrix.copy_(torch.cat([meant[f"{block}.{expert}.{part}.weight"] for part in parts]))
    return model


def sorted_columns(path: Path) -> PreTrainedModel:
    """GPTQ with desc_act: the columns of a group lie anywhere."""
    model = llama()
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    for name, tensor in dict(model.state_dict()).items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        order = torch.randperm(tensor.shape[-1], generator=generator)
        place = order.argsort()
        weight = rounded(tensor[:, order].contiguous(), GROUP)
        unsorted = Int4Weight(weight.codes[:, place], weight.zeros, weight.scales)
        layer = name.removesuffix(".weight")
        stored |= {f"{layer}.{last}": value for last, value in PACKED["gptq"](unsorted).items()}
        stored[f"{layer}.g_idx"] = (place // GROUP).int()
        tensor.copy_(weight.dequantize()[:, place])
    said = described("gptq", GROUP) | {"desc_act": True}
    write(path, model.config.to_dict() | {"dtype": "float32", "quantization_config": said}, stored)
    return model


def gguf(kind: str, path: Path) -> PreTrainedModel:
    """As llama.cpp's converter writes a Llama: rows of q and k in the order of its RoPE."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize

    model = llama()
    own = GGMLQuantizationType[kind]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(SIZES["hidden_size"] // HEADS)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    words = ["<s>", "</s>", *(chr(33 + i) for i in range(SIZES["vocab_size"] - 3)), "!!"]
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(words) - 2))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tensors = {}
    for name, tensor in model.state_dict().items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        numbers = tensor.numpy()
        if heads:
            numbers = numbers.reshape(heads, 2, -1, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
        linear = name.endswith("_proj.weight")
        data, used = _quantized(numbers, own) if linear else (numbers, GGMLQuantizationType.F32)
        written = name
        for ours, theirs in NAMES.items():
            written = written.replace(ours, theirs)
        writer.add_tensor(written, data, raw_dtype=used)
        meant = dequantize(data, used).reshape(numbers.shape)
        if heads:
            meant = meant.reshape(heads, -1, 2, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(meant)).float()
    for finish in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, finish)()
    model.load_state_dict(tensors)
    return model


def _quantized(numbers: Any, kind: Any) -> tuple[Any, Any]:
    """A tensor's bytes, and their kind: that of F16 where the kind has longer groups than a row, as llama.cpp does."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize

    group, size = GGML_QUANT_SIZES[kind]
    if numbers.shape[1] % group:
        kind = GGMLQuantizationType.F16
    if kind.name in ("Q4_K", "Q6_K"):  # gguf reads them and does not write them: random codes, small scales
        draw = np.random.default_rng(0)
        blocks = draw.integers(0, 256, (numbers.size // group, size), dtype=np.uint8)
        scale = np.full((len(blocks), 1), 1e-4, np.float16).view(np.uint8)
        for at in (0, 2) if kind.name == "Q4_K" else (size - 2,):
            blocks[:, at : at + 2] = scale
        return blocks.reshape(numbers.shape[0], -1), kind
    return quantize(numbers, kind), kind


FORMS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "a directory, safetensors": directory,
    "a directory, `.bin` in shards": bin_shards,
    "a LoRA adapter's directory": lora,
    "a vision-language model: its text part": vision_language,
    **{f"GGUF, {kind}": lambda path, kind=kind: gguf(kind, path) for kind in GGUF_KINDS},
    "AWQ": lambda path: four_bits("awq", path),
    "GPTQ": lambda path: four_bits("gptq", path),
    "compressed-tensors": lambda path: four_bits("compressed", path),
    "GPTQ with `desc_act`": sorted_columns,
    "AWQ, a mixture of experts: Mixtral": lambda path: mixture("mixtral", "awq", path),
    "GPTQ, a mixture of experts: Qwen3-MoE": lambda path: mixture("qwen3_moe", "gptq", path),
    "compressed-tensors, a mixture of experts: OLMoE": lambda path: mixture("olmoe", "compressed symmetric", path),
}


@cache
def measure(name: str) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model.gguf" if "GGUF" in name else "model")
        reference = FORMS[name](path)
        bound = bind(load_model(path, dtype="float32"))
        found = torch.cat(list(Reading(bound, KVFormat.parse("fp32")).logits(IDS.tolist()))).log_softmax(-1)
        reference.set_attn_implementation("eager")
        with torch.inference_mode():
            wanted: Tensor = reference(input_ids=IDS[None], use_cache=False).logits[0].log_softmax(-1)
    size = CacheSize.of(bound.shapes, KVFormat.parse("kv8"))
    same = torch.equal(found.argmax(-1), wanted.argmax(-1))
    return Measured(same, (found - wanted).abs().max().item(), size.token)
