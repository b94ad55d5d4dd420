"""Tiny random models of the language models that transformers knows: what the architecture tests run on.

A default config is shrunk by field name: `SMALL` says what a field of that name becomes wherever a config has it, and
`OVERRIDES` what one architecture needs beyond that. Features are made active, not removed: windows are shorter than the
tests' sequences and alternate with full layers, soft caps bite, experts are few but routed, K and V dims differ in MLA.
Weights are drawn anew with unit gain, and what starts as a constant (biases, norms, sinks, gates) gets noise, since a
model whose attention is nearly uniform or whose residual gate is zero would hide the very errors the tests look for.
"""
# ruff: noqa: C408  (keywords keep a table of fields readable)

from __future__ import annotations

import dataclasses
import math
import zlib
from copy import deepcopy
from functools import cache
from itertools import cycle, islice
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LAYERS = 4
VOCABULARY = 96
WINDOW = 6

SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    max_position_embeddings=128, n_positions=128,
    num_hidden_layers=LAYERS, n_layer=LAYERS, n_layers=LAYERS, num_layers=LAYERS, decoder_layers=LAYERS,
    encoder_layers=LAYERS,
    hidden_size=32, n_embd=32, d_model=32, embedding_dim=32, embedding_size=32, emb_dim=32,
    intermediate_size=48, ffn_dim=48, n_inner=48, decoder_ffn_dim=48, encoder_ffn_dim=48, d_inner=48,
    ffn_hidden_size=48, intermediate_size_mlp=48, dense_intermediate_size=48,
    num_attention_heads=4, n_head=4, n_heads=4, attention_heads=4, decoder_attention_heads=4, encoder_attention_heads=4,
    num_heads=4, num_key_value_heads=2, num_kv_heads=2, head_dim=8, kv_channels=8, d_kv=8,
    # Experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, num_experts_per_token=2, moe_topk=2, moe_k=2, top_k_experts=2,
    n_group=1, topk_group=1, num_expert_group=1, first_k_dense_replace=1,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, expert_ffn_hidden_size=16,
    # MLA
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    # Windows, soft caps, shared K/V
    sliding_window=WINDOW, use_sliding_window=True, max_window_layers=LAYERS // 2,
    attn_logit_softcapping=2.0, query_pre_attn_scalar=16, num_kv_shared_layers=2,
    # Linear attention, convolutions and state spaces
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_head_dim=8, linear_num_heads=4, conv_kernel_size=3,
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_d_ssm=64, mamba_num_heads=8, mamba_head_dim=8,
    ssm_state_size=8, n_groups=2, chunk_size=8, mamba_chunk_size=8,
    # Sparse attention's indexers
    index_head_dim=8, index_n_heads=4, index_topk=4,
    # Towers of multi-modal models
    image_size=16, patch_size=8, depth=1, out_hidden_size=32, embed_dim=32, projector_hidden_size=32, projection_dim=32,
    output_channels=8, mlp_dim=32, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32, layers=LAYERS,
    num_position_embeddings=16,
    is_decoder=True,
)  # fmt: skip

FULL_AND_SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Multi-modal RoPE: how many of the head dim's frequencies turn with time, height and width.
MROPE = dict(rope_parameters=ROPE | {"mrope_section": [2, 1, 1]})
HALF_MROPE = dict(rope_parameters=ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5})
# Queries that grow with the position, from position 8 on
GROWING = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.5,
           "original_max_position_embeddings": 8}  # fmt: skip
COMPASS = dict(rope_parameters=dict.fromkeys(FULL_AND_SLIDING, MROPE["rope_parameters"]))
GEMMA4 = dict(global_head_dim=16, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8)
INKLING = dict(
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=WINDOW, d_rel=4,
    rel_extent=32, local_layer_ids=[0, 2],
)  # fmt: skip
LLAMA4 = dict(attention_chunk_size=8, floor_scale=8)
MINIMAX_M3 = dict(shared_intermediate_size=16, layer_types=["minimax_m3_sparse", "full_attention"] * 2)
QWEN4 = dict(
    hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2,
)  # fmt: skip
TINY_SAM = dict(sam_config=dict(downsample_channels=[8, 16]))
TINY_VQ = dict(base_channels=32, num_embeddings=16, latent_channels=8, channel_multiplier=[1], num_res_blocks=1)

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1, 3]),
    "blt": dict(
        encoder_hash_byte_group_vocab=64,
        encoder_config=dict(hidden_size_global=32),
        decoder_config=dict(hidden_size_global=32),
    ),
    "chameleon": dict(vocabulary_map={"<image>": 3}, vq_config=TINY_VQ),
    "codegen": dict(rotary_dim=4),
    "cohere2_vision": dict(alignment_intermediate_size=32),
    "cohere_compass": dict(text_config=COMPASS),
    "cohere_compass_text": COMPASS,
    "cosmos3_edge": dict(text_config=MROPE),
    "cpmant": dict(dim_ff=48, dim_head=8),
    "ctrl": dict(dff=48),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=2.0, rope_theta=1e4), ffn_config=dict(moe_top_k=2)),
    "deepseek_ocr2": dict(vision_config=TINY_SAM, text_config=dict(mlp_layer_types=["dense", "sparse"] * 2)),
    "deepseek_v4": dict(num_key_value_heads=1, o_groups=2, o_lora_rank=8),
    "diffusion_gemma": dict(text_config=dict(global_head_dim=16)),
    "dots1": dict(n_shared_experts=1),
    "dots3_note_text": dict(
        head_dim=24, shared_experts_intermediate_size=16, layer_types=["indexed_attention", "sliding_attention"] * 2,
        swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_head_dim=24, swa_q_lora_rank=16, swa_kv_lora_rank=16,
        swa_qk_nope_head_dim=16, swa_qk_rope_head_dim=8, swa_v_head_dim=12,
    ),
    "emu3": dict(vocabulary_map={"<image>": 3}, vq_config=TINY_VQ | dict(codebook_size=16)),
    "gemma3n_text": dict(vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, laurel_rank=8),
    "gemma4": dict(text_config=GEMMA4),
    "gemma4_text": GEMMA4,
    "gemma4_unified": dict(text_config=dict(global_head_dim=16)),
    "gemma4_unified_text": dict(global_head_dim=16),
    "glm46v": dict(text_config=MROPE),
    "glm4v": dict(text_config=MROPE),
    "glm4v_moe": dict(text_config=HALF_MROPE),
    "glm5_next": dict(text_config=dict(index_kpool=2, qk_rope_head_dim=0)),
    "glm_ocr": dict(text_config=HALF_MROPE),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=WINDOW),
    "gptj": dict(rotary_dim=4),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "hunyuan_vl": dict(vision_config=dict(max_vit_seq_len=64, max_image_size=32, min_image_size=16)),
    "idefics": dict(vision_config=dict(embed_dim=32)),
    "inkling2": dict(text_config=INKLING, vision_config=dict(text_hidden_size=32)),
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "janus": dict(vq_config=TINY_VQ),
    "kosmos-2": dict(latent_query_num=4),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_vl": dict(text_config=dict(layer_types=["conv", "full_attention"] * 2)),
    "llama4": dict(text_config=LLAMA4),
    "llama4_text": LLAMA4,
    "longcat_flash": dict(zero_expert_num=2),
    "mamba2": dict(num_heads=8),
    "minimax_m3_vl": dict(text_config=MINIMAX_M3),
    "minimax_m3_vl_text": MINIMAX_M3,
    "ministral3": dict(rope_parameters=GROWING),
    "mistral4": dict(rope_parameters=GROWING),
    "mllama": dict(text_config=dict(cross_attention_layers=[1, 3])),
    "mllama_text_model": dict(cross_attention_layers=[1, 3]),
    "muse_spark": dict(
        text_config=dict(moe_hidden_size=32), audio_config=dict(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1])
    ),
    "nemotron_h": dict(moe_shared_expert_intermediate_size=16),
    "olmoe": dict(sliding_window=WINDOW),  # its attention call then names a window that its mask does not have
    "paddleocr_vl": dict(text_config=MROPE),
    "phi4_multimodal": dict(
        audio_config=dict(nemo_conv_channels=8, ext_pw_out_channel=32, depthwise_separable_out_channel=32)
    ),
    "qwen2_5_omni_thinker": dict(text_config=MROPE, audio_config=dict(max_source_positions=32)),
    "qwen2_5_vl": dict(text_config=MROPE),
    "qwen2_vl": dict(text_config=MROPE),
    "qwen3_omni_moe_thinker": dict(audio_config=dict(downsample_hidden_size=8, output_dim=32)),
    "qwen4_exp": dict(text_config=QWEN4),
    "qwen4_exp_text": QWEN4,
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 16], attention_head_size=8),
    "roc_bert": dict(pronunciation_embed_dim=8, pronunciation_vocab_size=16, shape_embed_dim=8, shape_vocab_size=16),
    "unlimited_ocr": dict(vision_config=TINY_SAM, text_config=dict(num_key_value_heads=4)),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_key_value_heads=4),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_key_value_heads=4),
    "zaya": dict(num_experts_per_tok=1),
    # One architecture with another feature switched on: the name before the plus sign says which.
    "gemma+bidirectional": dict(use_bidirectional_attention=True),
    "gemma4_text+k_eq_v": GEMMA4 | dict(attention_k_eq_v=True, num_global_key_value_heads=1, num_kv_shared_layers=0),
    "gemma4_text+moe": GEMMA4 | dict(enable_moe_block=True),
    "llama+dynamic": dict(rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 4.0}),
    "llama+linear": dict(rope_parameters=ROPE | {"rope_type": "linear", "factor": 4.0}),
    "llama+llama3": dict(
        rope_parameters=ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 16}
    ),
    "llama+yarn": dict(
        rope_parameters=ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    ),
    "llama4_text+full": LLAMA4 | dict(layer_types=["full_attention"] * LAYERS, attn_temperature_tuning=False),
    "llama4_text+temperature": LLAMA4 | dict(layer_types=["full_attention"] * LAYERS),
    # The sequences are longer than the original context, so the model itself takes the factors that binding pins.
    "phi3+longrope": dict(
        original_max_position_embeddings=4,
        rope_parameters=ROPE | {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3],
                                "long_factor": [1.5, 2.0, 3.0, 4.0], "original_max_position_embeddings": 4},
    ),
    "qwen2+full": dict(layer_types=["full_attention"] * LAYERS, use_sliding_window=False),
}  # fmt: skip

TIMM = "its vision tower needs the timm package"
IMAGE_TO_TEXT = "an encoder-decoder that reads images, too large to build by this recipe"
NOT_BUILT: dict[str, str] = {
    "dots3_note": "its default config names layers that a tiny model lacks; its text model is dots3_note_text",
    "ernie4_5_vl_moe": "the sizes of its text and image experts are coupled to its vision tower's",
    "fast_vlm": TIMM,
    "florence2": "the sizes of its multi-stage vision tower are lists coupled to each other",
    "gemma3n": TIMM + "; its text model is gemma3n_text",
    "gemma4_assistant": "a drafting head that reads the K and V of another model",
    "granite4_vision": "the sizes of its Q-formers are coupled to its vision tower's",
    "inkling_mm_model": "its vision tower needs the scipy package; its text model is inkling_text",
    "molmo2": "the sizes of its vision tower are lists coupled to each other",
    "nemotron_h_omni": "the sizes of its towers are coupled to each other; its text model is nemotron_h",
    "perception_lm": TIMM,
    "pix2struct": IMAGE_TO_TEXT,
    "pp_formulanet": IMAGE_TO_TEXT,
    "udop": IMAGE_TO_TEXT,
}


def names() -> list[str]:
    """What `build` makes: architectures by transformers' model type, and variants of them as `type+feature`."""
    known = _classes()
    return sorted({*known, *(name for name in OVERRIDES if _architecture(name) in known)} - set(NOT_BUILT))


def build(name: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A tiny random float32 model in eval mode, the same for the same name and seed; `more` is for its config."""
    model_class = _classes()[_architecture(name)]
    # A copy: mistral4's config writes into the dict it is given, which ministral3 has too.
    config = tiny_config(model_class.config_class, deepcopy(OVERRIDES.get(name, {})) | more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()) + seed)
        model = model_class(config).float().eval()
        _randomize(model)
    return model


def _architecture(name: str) -> str:
    return name.partition("+")[0]


@cache
def _classes() -> dict[str, type[PreTrainedModel]]:
    """Model class by model type. Types that lead to the same class count once, under the class's own config's type."""
    found: dict[str, type[PreTrainedModel]] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for name in mapping.values():
            model_class = getattr(transformers, name)
            found.setdefault(model_class.config_class.model_type, model_class)
    return found


def aliases() -> dict[str, str]:
    """Model types that lead to the class of another one, which stands for them."""
    stands = {model_class.__name__: name for name, model_class in _classes().items()}
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {name: stands[found] for name, found in sorted(mapping.items()) if name not in _classes()}


def tiny_config(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A default config of that class, shrunk by field name; an override of a config within is a dict of its own."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = SMALL["num_attention_heads"]  # expanded MLA has no groups
    if "layer_types" in fields:
        values["layer_types"] = _layer_types(config_class, fields)
    for name in config_class.sub_configs:
        default = getattr(config_class(), name)  # of the right class, where `sub_configs` says AutoConfig
        if isinstance(default, PreTrainedConfig):
            values[name] = tiny_config(type(default), overrides.get(name, {}))
    return config_class(**values | {name: v for name, v in overrides.items() if name not in config_class.sub_configs})


def _layer_types(config_class: type[PreTrainedConfig], fields: set[str]) -> list[str] | None:
    """The default's kinds of layer in turn; a window that is off by default is switched on."""
    kinds = list(dict.fromkeys(getattr(config_class(), "layer_types", None) or ()))
    if "sliding_window" in fields and set(kinds) <= set(FULL_AND_SLIDING):
        return FULL_AND_SLIDING
    return list(islice(cycle(kinds), LAYERS)) if kinds else None


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:  # inputs of an output: a matrix's last dim, stacked or not, and all but the first of an image's filter
            inputs = parameter.shape[-1] if parameter.dim() < 4 else math.prod(parameter.shape[1:])
            parameter.copy_(noise / math.sqrt(inputs))
