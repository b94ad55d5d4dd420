"""InternLM v1 and v2, which ship as remote code, read as what they are: Llamas with other names.

Their repositories ask to run Python found next to the weights. Octavo never does. The first generation is a Llama with
biases in q, k, v and o, under Llama's own tensor names. The second fuses q, k and v into one `wqkv` and renames the
rest, so its tensors are split and renamed at load. Both keep their vocabulary in a sentencepiece `tokenizer.model`,
which the sentencepiece library itself encodes and decodes here, so ids agree with the original by construction.
This module knows configs, tensors and text; it opens no weight file.
"""

import re
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from octavo.errors import OctavoError, Unsupported

MODEL_TYPES = frozenset({"internlm", "internlm2"})

# Turns as in the first release. A prompt carries its own <s>, as `apply_chat_template` adds none.
_V1_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|System|>:' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>:' + message['content'] + '<eoh>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|Bot|>:' + message['content'] + '<eoa>\n' }}"
    "{% else %}{{ raise_exception('InternLM knows the roles system, user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}"
)
_V2_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_TEMPLATES = {"internlm": _V1_TEMPLATE, "internlm2": _V2_TEMPLATE}

_LLAMA_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_RENAMED = re.compile("|".join(rf"(?<=\.){re.escape(name)}$" for name in _LLAMA_NAMES))


def llama_config(raw: dict[str, Any]) -> LlamaConfig:
    """The Llama that an InternLM `config.json` describes. Raises Unsupported for a RoPE the originals do not have."""
    # What both generations assume where their config.json is silent.
    known = {"bias": True, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False} | raw
    return LlamaConfig(
        vocab_size=known["vocab_size"],
        hidden_size=known["hidden_size"],
        intermediate_size=known["intermediate_size"],
        num_hidden_layers=known["num_hidden_layers"],
        num_attention_heads=known["num_attention_heads"],
        num_key_value_heads=known.get("num_key_value_heads"),
        hidden_act=known.get("hidden_act", "silu"),
        max_position_embeddings=known.get("max_position_embeddings", 2048),
        initializer_range=known.get("initializer_range", 0.02),
        rms_norm_eps=known.get("rms_norm_eps", 1e-6),
        attention_bias=known["bias"],
        rope_parameters=_rope(raw),
        tie_word_embeddings=known["tie_word_embeddings"],
        pad_token_id=known.get("pad_token_id"),
        bos_token_id=known["bos_token_id"],
        eos_token_id=known["eos_token_id"],
        dtype=known.get("torch_dtype") or known.get("dtype"),
        architectures=["LlamaForCausalLM"],
    )


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Three spellings: `rotary` {type, base} in v1's first release, `rope_scaling` {type, factor}, or `rope_theta`."""
    rotary, scaling = raw.get("rotary") or {}, raw.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type") or rotary.get("type") or "default"
    theta = float(raw.get("rope_theta") or rotary.get("base") or 10000.0)
    if kind in ("default", "origin"):
        return {"rope_type": "default", "rope_theta": theta}
    if kind in ("dynamic", "linear"):
        factor = scaling.get("factor") or rotary.get("scaling_factor") or 1.0
        return {"rope_type": kind, "rope_theta": theta, "factor": float(factor)}
    raise Unsupported(f"InternLM with {kind!r} RoPE is not supported: only plain, dynamic and linear RoPE are.")


def llama_tensors(tensors: dict[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """InternLM2's tensors under Llama's names, `wqkv` split into q, k and v.

    Raises OctavoError where the shape of `wqkv` is another.
    """
    llama = {}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        for part, rows in llama_layers(layer, config).items():
            if rows is not None and tensor.shape[0] != (height := _fused_rows(config)):
                raise OctavoError(
                    f"The weight {name} has {tensor.shape[0]} rows where config.json asks for {height}: "
                    "the weights belong to another config, so fetch both again."
                )
            llama[f"{part}.{last}"] = tensor if rows is None else tensor[rows]
    return llama


def llama_layers(layer: str, config: LlamaConfig) -> dict[str, torch.Tensor | None]:
    """The Llama layers that a layer of InternLM2 becomes, each with the rows that it takes, None for all.

    `wqkv` rows are [kv_heads, q_per_kv + 2, head_dim]: each KV head's queries, then its key, then its value.
    """
    if not layer.endswith(".attention.wqkv"):
        renamed = _RENAMED.sub(lambda match: _LLAMA_NAMES[match[0]], layer)
        return {"lm_head" if renamed == "output" else renamed: None}
    rows = torch.arange(_fused_rows(config)).view(config.num_key_value_heads, -1, config.head_dim)
    parts = {"q_proj": rows[:, :-2], "k_proj": rows[:, -2], "v_proj": rows[:, -1]}
    return {layer.replace("attention.wqkv", f"self_attn.{part}"): value.flatten() for part, value in parts.items()}


def _fused_rows(config: LlamaConfig) -> int:
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim


class SentencePieceTokenizer(SentencePieceBackend):
    """A sentencepiece `tokenizer.model` as a transformers tokenizer. Text between special tokens is the library's own.

    So the dummy prefix, byte fallback and user-defined symbols (`<eoh>`, `<|Bot|>`, ...) are the model file's. It also
    serves old Llamas without a tokenizer.json: transformers converts those with protobuf, and can lose the prefix.
    """

    model_input_names = ("input_ids", "attention_mask")
    padding_side = "left"

    def __init__(self, vocab_file: str, add_bos_token: bool = True, add_eos_token: bool = False, **kwargs: Any) -> None:
        ends = [name for name, wanted in (("bos", add_bos_token), ("eos", add_eos_token)) if wanted]
        named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        kwargs = (
            named
            | kwargs
            | {
                "vocab_file": vocab_file,
                "legacy": True,  # take the model file's normalizer as it is
                "special_tokens_pattern": "_".join(ends) or "none",
                "sp_model_kwargs": kwargs.get("sp_model_kwargs") or {},  # InternLM2 ships a null
            }
        )
        super().__init__(add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs)

    def _convert_id_to_token(self, index: int) -> str:
        # An embedding padded beyond the vocabulary can sample an id that has no piece.
        return self.sp_model.IdToPiece(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Special tokens stand as they are; what lies between them is decoded by sentencepiece."""
        text = ""
        run: list[str] = []
        for token in tokens:
            if token in self._added_tokens_encoder:
                text += self.sp_model.decode(run) + token
                run = []
            elif token:
                run.append(token)
        return text + self.sp_model.decode(run)
