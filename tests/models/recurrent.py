"""Model types with recurrent layers: answers through the engine against those of transformers with its own cache of
states and of K and V: its `generate`, token by token, and one forward over prompt and answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from octavo.engine.sequence import Sequence
from octavo.errors import LISTED, Unsupported
from octavo.models.bind import BoundModel, bind
from octavo.models.model import Model
from tests.engine.driving import engine, run
from tests.models import zoo

NAMES = (
    "bamba", "bailing_hybrid", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3",
    "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma",
    "zamba2", "mamba2", "falcon_mamba",
)  # fmt: skip
LENGTHS = (31, 5, 18, 40, 12, 1, 23, 9)  # tokens of the prompts
ANSWER = 12
NEAR = 1e-4  # of log-probabilities
# Four whose sizes are multiples of 32, as most real models' are: torch computes two registers at a time, of 16 numbers
# where there is AVX-512, and the last ones by another formula, so that they depend on what lies behind them.
SIZED: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"head_dim": 64, "linear_num_key_heads": 8, "linear_num_value_heads": 32},
    "granitemoehybrid": {"mamba_d_head": 16, "num_local_experts": 0, "num_experts_per_tok": 0},
    "lfm2": {},
    "falcon_h1": {"head_dim": 16},
}

Answer = tuple[list[int], list[float]]  # tokens, and their log-probabilities


@dataclass(frozen=True)
class Outcome:
    """What became of a type: how far answers were off, or why it was refused."""

    name: str
    reason: str = ""
    tokens: bool = True  # whether all are equal
    error: float = 0.0  # of log-probabilities, against one forward
    by_token: float = 0.0  # the same, against `generate`
    own: float = 0.0  # what these two of transformers differ by
    states: int = 0  # bytes of a session's states


@cache
def measure(name: str) -> Outcome:
    try:
        bound = bind(zoo.build(name))
    except Unsupported as refusal:
        return Outcome(name, str(refusal).removesuffix(f". {LISTED}"))
    hf, found = own_model(name), run(engine(bound, "fp32"), prompts(), ANSWER, logprobs=1)
    generated = [_own_answer(hf, prompt) for prompt in prompts()]
    equal = all(one.output == tokens for one, (tokens, _) in zip(found, generated, strict=True))
    ours = [logprob for one in found for logprob in logprobs_of(one)]
    by_token = [logprob for _, logprobs in generated for logprob in logprobs]
    at_once = [logprob for prompt, (tokens, _) in zip(prompts(), generated, strict=True)
               for logprob in _own_reading(hf, prompt, tokens)]  # fmt: skip
    errors = _largest(ours, at_once), _largest(ours, by_token), _largest(at_once, by_token)
    return Outcome(name, "", equal, *errors, bound.states.nbytes)


def _largest(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def served(name: str) -> BoundModel:
    """One of the four as it is served: its weights in the native kernels' order."""
    hf = zoo.build(name, hidden_size=64, max_position_embeddings=2048, **SIZED[name])
    return Model.of(hf, Path(name)).bound


def logprobs_of(sequence: Sequence) -> list[float]:
    return [one.logprob for one in sequence.sampled if one.logprob is not None]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def own_answers(name: str) -> list[Answer]:
    """Greedy answers to the prompts by transformers, each alone."""
    hf = own_model(name)
    return [_own_answer(hf, prompt) for prompt in prompts()]


def own_model(name: str) -> PreTrainedModel:
    """transformers' own, with eager attention."""
    hf = zoo.build(name)
    if hf._can_set_attn_implementation():
        hf.set_attn_implementation("eager")
    return hf


@torch.inference_mode()
def _own_answer(hf: PreTrainedModel, prompt: list[int]) -> Answer:
    hf.generation_config.eos_token_id = None
    found = hf.generate(
        torch.tensor([prompt]), max_new_tokens=ANSWER, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    logprobs = [row.float().log_softmax(-1).max().item() for row in found.logits]
    return found.sequences[0, len(prompt) :].tolist(), logprobs


@torch.inference_mode()
def _own_reading(hf: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probabilities of an answer's tokens in one forward over all of the text."""
    logits = hf(torch.tensor([prompt + answer]), use_cache=True).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()
