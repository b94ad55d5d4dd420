"""A transformers Llama as the GGUF file that llama.cpp reads: the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from octavo.weights.layouts import SYMMETRIC, Int4Weight

Q4_0 = 32  # weights that share a scale

NAMES = {  # of transformers and of GGUF
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(hf: LlamaForCausalLM, file: Path, int4: Mapping[str, Int4Weight] | None = None) -> None:
    """Matrices in bf16, norms in float32, no tokenizer. Linear layers in `int4`, by name, are written in Q4_0; `hf`
    need not hold their weights."""
    config = hf.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if int4 else gguf.LlamaFileType.MOSTLY_BF16)
    for name, packed in (int4 or {}).items():
        rows = q4_0(packed)
        if name.endswith(("q_proj", "k_proj")):
            rows = interleaved(rows, config.head_dim)
        writer.add_tensor(gguf_name(name), rows.numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for name, weight in hf.state_dict().items():
        if weight.dim() == 1:
            writer.add_tensor(gguf_name(name), weight.float().numpy())
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, config.head_dim)
        rows = weight.bfloat16().contiguous().view(torch.uint8).numpy()
        writer.add_tensor(gguf_name(name), rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q4_0(weight: Int4Weight) -> Tensor:
    """uint8 [out, in/32 · 18]: of every 32 weights the float16 scale, then 16 bytes with weights j and j + 16 in their
    halves. A wider group's scale is repeated. The zero is fixed: raises ValueError for another."""
    if weight.group_size % Q4_0 or not torch.all(weight.zeros == SYMMETRIC):
        raise ValueError("Q4_0 has blocks of 32 weights and a zero of 8")
    blocks = weight.codes.unflatten(1, (-1, 2, Q4_0 // 2))
    scales = weight.scales.half().repeat_interleave(weight.group_size // Q4_0, dim=1)
    halves = blocks[:, :, 0] | blocks[:, :, 1] << 4
    return torch.cat((scales[..., None].view(torch.uint8), halves), dim=-1).flatten(1)


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
    name = name.removesuffix(".weight")
    if name in NAMES:
        return f"{NAMES[name]}.weight"
    _, _, layer, module = name.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.weight"


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k projection in the order of GGUF's Llamas, which rotate neighbouring dimensions (0, 1), (2, 3), …
    where transformers rotates dimensions half a head apart."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def f16_gguf(source: Path, file: Path) -> None:
    """A quantized GGUF with its matrices decoded to float16, everything else as it is, the tokenizer too."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(file, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind.name == "ARRAY" else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
