"""The bundled model with Qwen2-like key biases: large constants on a few key channels of the first and last layer."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import LlamaForCausalLM

from octavo.models.load import load_model
from octavo.models.model import Model

CHANNELS = {3: 40.0, 17: -25.0, 40: 60.0, 61: 80.0}  # of each KV head


def save_biased(model: Model, directory: Path) -> Path:
    config = copy.deepcopy(model.bound.hf.config)
    config.attention_bias = True
    hf = LlamaForCausalLM(config)
    hf.load_state_dict(load_model(model.path).state_dict(), strict=False)
    for layer in (hf.model.layers[0], hf.model.layers[-1]):
        for channel, bias in CHANNELS.items():
            layer.self_attn.k_proj.bias.data.view(config.num_key_value_heads, -1)[:, channel] = bias
    hf.save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    return directory
