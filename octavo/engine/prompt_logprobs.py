"""How likely a model finds a text that is given: log-probabilities of a prompt's tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from octavo.engine.reading import Reading
from octavo.engine.sampling import LEAST_LOGPROB, likeliest


@dataclass(frozen=True)
class Scored:
    """A token that was given, where it stood."""

    token: int
    logprob: float
    rank: int  # 1 for the most likely
    top: dict[int, float]  # the most likely tokens, best first


@torch.inference_mode()
def score(reading: Reading, tokens: Sequence[int], most: int) -> Iterator[list[Scored]]:
    """Of every token but the first, and of the `most` likeliest in its place, some at a time."""
    at = 1
    for logits in reading.logits(tokens):
        following = torch.tensor(tokens[at : at + len(logits)], device=logits.device)
        logits = logits[: len(following)]
        logprobs = logits.log_softmax(-1).clamp_min(LEAST_LOGPROB)
        own = logprobs.gather(-1, following[:, None])
        ranks = (logprobs > own).sum(-1) + 1
        best = likeliest(logits, min(most, logits.shape[-1]))
        columns = (own[:, 0], ranks, best, logprobs.gather(-1, best))
        rows = zip(following.tolist(), *(column.tolist() for column in columns), strict=True)
        yield [Scored(token, p, rank, dict(zip(ids, ps, strict=True))) for token, p, rank, ids, ps in rows]
        at += len(logits)
