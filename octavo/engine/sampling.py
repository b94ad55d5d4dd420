"""From logits to the next token: one batched function for all that requests ask for (params.py).

Order, as in transformers: repetition penalty, temperature, top-k, top-p, min-p. Presence and frequency penalties and
the bias of tokens come after the repetition penalty, and last what `min_tokens` and the answer's grammar allow. The
draw is an exponential race, argmax(p/e) with e ~ Exp(1), whose noise is a function of the request's seed, the position
and the token. Of tokens that are equally likely the one with the lower id comes first, in every cut and every list. So
a row of logits leads to the same token whatever the rows beside it.

All of it happens where the logits are. On a GPU nothing waits for the device until the result is read.
"""

import logging
import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.devices import device_of, send
from octavo.engine.sequence import Sampled, Sequence

logger = logging.getLogger("octavo")
OVERFLOW = (
    "the model's logits are not finite: its numbers overflow. Choose a --dtype of a larger range, bf16 or fp32; if it "
    "is one already, the weights are corrupted"
)
LEAST_LOGPROB = -9999.0  # of a token that cannot come, as in vLLM: JSON has no infinity


@dataclass
class Choice:
    """Tokens chosen for n sequences, on their way to the host."""

    tokens: Tensor  # [n] on the logits' device
    wanted: list[int | None]  # log-probabilities of each
    finite: Tensor  # [n] whether each row of logits was
    failed: dict[int, str]  # rows that have none, and why
    chosen: Tensor | None = None  # [n] log-probability of the token
    top: tuple[Tensor, Tensor] | None = None  # log-probabilities and tokens, [n, most wanted], best first

    def __post_init__(self) -> None:
        device = device_of(self.tokens.device)
        found = (self.tokens, self.finite, self.chosen, *(self.top or ()))
        self._host = [device.fetch(x) for x in found if x is not None]
        self._wait = device.mark()

    def read(self) -> list[Sampled]:
        """The tokens; waits for the device, though not for what was queued after they were chosen."""
        self._wait()
        tokens, finite, *columns = [x.tolist() for x in self._host]
        if self.chosen is None:
            sampled = [Sampled(token) for token in tokens]
        else:
            sampled = [
                Sampled(token) if n is None else Sampled(token, own, dict(zip(ids[:n], values[:n], strict=True)))
                for n, token, own, values, ids in zip(self.wanted, tokens, *columns, strict=True)
            ]
        overflows = {i: OVERFLOW for i, good in enumerate(finite) if not good}
        for i, why in (self.failed | overflows).items():
            sampled[i] = Sampled(tokens[i], error=why)
        return sampled


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
    """The next token of each sequence from its row of `logits` [sequences, vocabulary]."""
    return choose(logits, sequences).read()


@torch.inference_mode()
def choose(logits: Tensor, sequences: Rows[Sequence], ahead: bool = False) -> Choice:
    """As `sample`, without waiting. `ahead`: each sequence has one token more than the host knows of."""
    logits = logits.float()
    finite = logits.amax(-1).isfinite()  # the largest is NaN if any is
    wanted = [s.params.logprobs for s in sequences]
    logprobs = top = None
    if most := [n for n in wanted if n is not None]:
        logprobs = logits.log_softmax(-1)
        top = likeliest(logits, min(max(most), logits.shape[-1]))
    failed = {}
    for i, sequence in enumerate(sequences):
        try:
            _adjust(logits[i], sequence, ahead)
        except Exception:  # what one request asks for must not end the others
            logger.exception("the next token of a request cannot be chosen: its answer is ended")
            failed[i] = "the answer cannot be continued as the request demands"
    tokens = argmax(logits)
    drawn = [i for i, s in enumerate(sequences) if s.params.temperature > 0]
    if drawn:
        rows = send(torch.tensor(drawn), logits.device)
        tokens[rows] = _draw(logits[rows], [sequences[i] for i in drawn], ahead)
    if logprobs is None or top is None:
        return Choice(tokens, wanted, finite, failed)
    chosen, best = (logprobs.gather(-1, ids).clamp_min(LEAST_LOGPROB) for ids in (tokens[:, None], top))
    return Choice(tokens, wanted, finite, failed, chosen[:, 0], (best, top))


def _adjust(row: Tensor, sequence: Sequence, ahead: bool) -> None:
    """Change the logits [vocabulary] of one sequence as its request asks."""
    params = sequence.params
    if params.repetition_penalty != 1:
        seen = send(torch.tensor(list(sequence.seen.of(sequence.tokens))), row.device)
        penalty = params.repetition_penalty
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    if (params.presence_penalty or params.frequency_penalty) and (said := sequence.said.of(sequence.tokens)):
        # OpenAI's API reference, "frequency and presence penalties": over the generated tokens alone.
        ids, counts = send(torch.tensor([list(said), list(said.values())]), row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids, bias = (
            torch.tensor(list(params.logit_bias)),
            torch.tensor(list(params.logit_bias.values()), dtype=row.dtype),
        )
        row[send(ids, row.device)] += send(bias, row.device)
    if sequence.answered + ahead < params.min_tokens and sequence.stop_ids:
        row[send(torch.tensor(sorted(sequence.stop_ids)), row.device)] = -torch.inf
    if sequence.guide:
        sequence.guide.restrict(row, sequence.max_len - len(sequence.tokens))


def _draw(logits: Tensor, sequences: Rows[Sequence], ahead: bool) -> Tensor:
    """Random tokens [rows] from logits [rows, vocabulary]."""
    params = [s.params for s in sequences]
    vocabulary = logits.shape[-1]
    # No temperature is too small for float32: the colder, the closer to greedy, never inf or NaN.
    columns = [(max(p.temperature, 1e-30), p.top_k or vocabulary, p.top_p if p.top_p < 1 else 2.0, p.min_p)
               for p in params]  # fmt: skip
    temperature, top_k, top_p, min_p = send(torch.tensor(columns, dtype=torch.float32), logits.device)[
        :, :, None
    ].unbind(1)
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()  # the best token's is 1
    kept = max(p.top_k or vocabulary for p in params)
    if kept < vocabulary or any(p.top_k or p.top_p < 1 or p.min_p for p in params):
        index = likeliest(logits, min(kept, vocabulary))
        best = weights.gather(-1, index)
        best.masked_fill_(torch.arange(best.shape[-1], device=best.device) >= top_k, 0)
        sums = best.cumsum(-1)  # in order, so that zeros behind a row's own cut change nothing
        best.masked_fill_((sums - best >= top_p * sums[:, -1:]) | (best < min_p), 0)  # the best token always stays
        weights = torch.zeros_like(weights).scatter_(-1, index, best)
    return argmax(weights / _race(sequences, vocabulary, ahead, logits.device))


def argmax(x: Tensor) -> Tensor:
    """The column [rows] of each row's largest number, and of equal ones the lowest; any NaN counts as the largest.

    On a CPU torch's own reads number by number, and its `amax` by registers: so blocks are compared first.
    """
    blocks = x.unflatten(-1, (-1, math.gcd(x.shape[-1], 128)))
    best = blocks.amax(-1).argmax(-1)
    within = blocks[torch.arange(len(x), device=x.device), best].argmax(-1)
    return best * blocks.shape[-1] + within


def likeliest(x: Tensor, k: int) -> Tensor:
    """Columns [rows, k] of the k largest of each row, best first; of equal ones, which `topk` returns as it comes, the
    lowest."""
    columns = x.shape[-1]
    if k == columns:
        return x.sort(descending=True, stable=True).indices
    if k == 0:
        return x.new_empty(len(x), 0, dtype=torch.int64)
    least = x.topk(k).values[:, -1:]
    low_first = torch.arange(columns - 1, -1, -1, dtype=torch.int32, device=x.device)
    order = torch.where(x > least, low_first + columns, torch.where(x == least, low_first, -1))
    index = order.topk(k).indices  # all that are larger, and as many equal ones as there is room for; each by column
    return index.gather(-1, x.gather(-1, index).sort(descending=True, stable=True).indices)


def _race(sequences: Rows[Sequence], vocabulary: int, ahead: bool, device: torch.device) -> Tensor:
    """e ~ Exp(1) [rows, vocabulary], over all tokens in their order, whatever the neighbours cut."""
    keys = [(s.seed - (s.seed >> 63 << 64), len(s.tokens) + ahead) for s in sequences]  # as int64
    seed, position = send(torch.tensor(keys), device).unbind(1)
    stream = _mixed(_mixed(seed) + position)[:, None]
    bits = _mixed(stream + _GOLDEN * torch.arange(1, vocabulary + 1, device=device))
    uniform = (bits >> 1 & (1 << 63) - 1).float() * 2**-63  # small ones keep all their digits, and those win
    return -torch.log1p(-uniform.clamp(1e-30, 1 - 2**-24))


_GOLDEN = -0x61C8864680B583EB  # 0x9E37…7C15 as int64


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") on int64,
    whose products wrap and whose shifts repeat the sign, which is masked away."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)
