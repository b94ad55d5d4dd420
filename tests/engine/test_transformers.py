"""The same greedy tokens as transformers' own `generate`, with its own attention and cache, on many architectures."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.bind import bind, unbound
from octavo.models.model import Model
from tests.engine.driving import drain, engine, run
from tests.models import zoo

# What each brings beyond plain multi-head attention with RoPE:
ARCHITECTURES = (
    "cohere",  # parallel blocks, logit scale
    "gemma2",  # windows in every other layer, soft caps, own scale
    "gemma3_text",  # windows, query and key norms, two RoPEs
    "glm4",  # rotates a part of the head, in pairs
    "gpt2",  # learned positions
    "gpt_bigcode",  # one KV head, learned positions
    "gpt_neox",  # fused qkv, rotates a part of the head
    "gpt_oss",  # sinks, windows, experts
    "granite",  # own scale and multipliers
    "llama",
    "mistral",  # a window
    "mixtral",  # experts
    "olmo2",  # norms over all heads
    "phi3",  # fused qkv, a window
    "qwen2",  # biases, windows
    "qwen3",
    "stablelm",  # rotates a part of the head
)
LENGTHS = (3, 30, 11, 17, 1)
TOKENS = 20


def reference(hf: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """transformers' answer; no token ends it early."""
    hf.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def with_own_head(hf: PreTrainedModel) -> PreTrainedModel:
    """The model with an output layer apart from its embeddings: tied and random, it would repeat its last token."""
    head = hf.get_output_embeddings()
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(7))
    head.weight = nn.Parameter(noise, requires_grad=False)
    return hf


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_of_prompts_gets_the_tokens_that_generate_gives_each_alone(name: str):
    hf = with_own_head(zoo.build(name))
    bound = bind(deepcopy(hf))
    hf.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    expected = [reference(hf, prompt, TOKENS) for prompt in prompts]
    assert sum(len(set(answer)) > 5 for answer in expected) > 2, "the model repeats itself: nothing to compare"

    at_once = run(engine(bound, block_size=4), prompts, TOKENS)
    assert [sequence.output for sequence in at_once] == expected

    crowded = engine(bound, block_size=4, blocks=30, budget=9, batch=3)  # chunks, preemptions, and windows across them
    assert [sequence.output for sequence in run(crowded, prompts + prompts, TOKENS)] == expected * 2


def test_the_bundled_model_answers_text_as_generate_does(pamphlet: Model, text_ids: list[int]):
    prompts = [pamphlet.tokenizer("Once upon a time")["input_ids"], text_ids[:200], text_ids[700:733]]
    with unbound(pamphlet.bound) as hf:
        expected = [reference(hf, prompt, 40) for prompt in prompts]
    assert [sequence.output for sequence in run(engine(pamphlet.bound), prompts, 40)] == expected


def test_a_model_is_bound_again_after_its_own_attention_had_it(pamphlet: Model, text_ids: list[int]):
    sequence = Sequence(text_ids[:50], SamplingParams(max_tokens=6))
    interrupted = engine(pamphlet.bound)
    interrupted.add(sequence)
    interrupted.step()
    with unbound(pamphlet.bound) as hf:
        expected = reference(hf, text_ids[:50], 6)
    drain(interrupted)
    assert sequence.output == expected
