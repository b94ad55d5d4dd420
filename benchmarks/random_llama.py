"""The Llama of the comparisons with peers: 4 layers of random bf16 weights, for speed does not ask what they say."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.calibrate import calibrate
from octavo.models.model import Model
from octavo.quant.calibration import Calibration

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


def random_llama(config: LlamaConfig = CONFIG) -> LlamaForCausalLM:
    """The plain transformers model, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = LlamaForCausalLM._from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    return hf.eval().requires_grad_(False)


def served(hf: LlamaForCausalLM) -> Model:
    """The model as `Model.load` would have it, but for a tokenizer. Takes `hf` over."""
    return Model.of(hf, Path("random-llama"))


def calibrated(model: Model) -> Calibration:
    """Over four windows of random tokens."""
    windows = torch.randint(model.bound.vocab_size, (4, 512), generator=torch.Generator().manual_seed(0)).tolist()
    return calibrate(model, windows, dataset="random tokens")
