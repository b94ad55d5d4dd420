"""Model types with recurrent layers: answers through the engine against those of transformers' `generate`, which keeps
states and K and V in its own cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from octavo.engine.sequence import Sequence
from octavo.errors import LISTED, Unsupported
from octavo.models.bind import bind
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

Answer = tuple[list[int], list[float]]  # tokens, and their log-probabilities


@dataclass(frozen=True)
class Outcome:
    """What became of a type: how far answers were off, or why it was refused."""

    name: str
    reason: str = ""
    tokens: bool = True  # whether all are equal
    error: float = 0.0  # of log-probabilities
    states: int = 0  # bytes of a session's states


def measure(name: str) -> Outcome:
    try:
        bound = bind(zoo.build(name))
    except Unsupported as refusal:
        return Outcome(name, str(refusal).removesuffix(f". {LISTED}"))
    wanted = own_answers(name)
    found = run(engine(bound, "fp32"), prompts(), ANSWER, logprobs=1)
    errors = [abs(a - b) for one, (_, logprobs) in zip(found, wanted, strict=True)
              for a, b in zip(logprobs_of(one), logprobs, strict=True)]  # fmt: skip
    equal = all(one.output == tokens for one, (tokens, _) in zip(found, wanted, strict=True))
    return Outcome(name, tokens=equal, error=max(errors), states=bound.states.nbytes)


def logprobs_of(sequence: Sequence) -> list[float]:
    return [one.logprob for one in sequence.sampled if one.logprob is not None]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def own_answers(name: str) -> list[Answer]:
    """Greedy answers to the prompts by transformers, each alone."""
    hf = zoo.build(name)
    if hf._can_set_attn_implementation():
        hf.set_attn_implementation("eager")
    return [_own_answer(hf, prompt) for prompt in prompts()]


@torch.inference_mode()
def _own_answer(hf: PreTrainedModel, prompt: list[int]) -> Answer:
    hf.generation_config.eos_token_id = None
    found = hf.generate(
        torch.tensor([prompt]), max_new_tokens=ANSWER, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    logprobs = [row.float().log_softmax(-1).max().item() for row in found.logits]
    return found.sequences[0, len(prompt) :].tolist(), logprobs
