"""A transformers Llama as the GGUF file that llama.cpp reads: the same weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

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


def write_gguf(hf: LlamaForCausalLM, file: Path) -> None:
    """Matrices in bf16, norms in float32, no tokenizer."""
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
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
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
