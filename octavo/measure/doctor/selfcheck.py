"""Is a sequence computed among others the same as alone, and the same as transformers computes it?

Two random sequences of different lengths run packed in one step and are then decoded together, on an unquantized cache.
Each is also run alone, and through the model's own attention without any cache. Rounding makes small differences;
a mask, a position or a state that leaks from one sequence to another makes large ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.engine.reading import Reading
from octavo.models.bind import BoundModel, unbound
from octavo.quant.format import dtype_name

LENGTHS = (75, 22)  # one crosses the end of a block, one does not
DECODED = 6  # of them one by one
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # of a row's norm; what leaks is of the order of 1


@dataclass(frozen=True)
class SelfCheck:
    """Relative errors of the logits' rows: the median, and the worst."""

    alone: tuple[float, float]  # packed, against each sequence alone through the same cache
    transformers: tuple[float, float]  # packed, against the model's own attention
    tolerance: float

    @property
    def passed(self) -> bool:
        """The median row within rounding, and none far outside: in 16 bits a router of experts may flip for a few."""
        return all(
            median <= self.tolerance and worst <= 10 * self.tolerance
            for median, worst in (self.alone, self.transformers)
        )


def self_check(bound: BoundModel) -> SelfCheck:
    lengths = [min(length, bound.max_context) for length in LENGTHS]
    ids = torch.tensor(bound.random_tokens(sum(lengths))).split(lengths)
    texts = [part.tolist() for part in ids]
    packed = torch.cat(_logits(bound, texts))
    alone = torch.cat([_logits(bound, [text])[0] for text in texts])
    with unbound(bound, "eager") as hf, torch.inference_mode():
        own = [hf(input_ids=part[None].to(bound.device), use_cache=False).logits[0].float().cpu() for part in ids]
    return SelfCheck(_errors(packed, alone), _errors(packed, torch.cat(own)), TOLERANCE[dtype_name(bound.dtype)])


def _logits(bound: BoundModel, texts: Sequence[list[int]]) -> list[Tensor]:
    """Float logits [length, vocabulary] of texts that share every step: one prefill, then one token each."""
    first = [max(1, len(text) - DECODED) for text in texts]
    cuts = [first] + [
        [int(n + step < len(text)) for n, text in zip(first, texts, strict=True)] for step in range(DECODED)
    ]
    rows: list[list[Tensor]] = [[] for _ in texts]
    for cut, logits in zip(cuts, Reading(bound).steps(texts, cuts), strict=True):
        for own, part in zip(rows, logits.cpu().split(cut), strict=True):
            own.append(part)
    return [torch.cat(parts) for parts in rows]


def _errors(a: Tensor, b: Tensor) -> tuple[float, float]:
    errors = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)
    return errors.median().item(), errors.max().item()
