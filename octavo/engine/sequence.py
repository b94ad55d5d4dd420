"""One request on its way through the engine: tokens in, tokens out, and where its K and V stand."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from octavo.cache.holding import Holding
from octavo.engine.params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort", "error"]


class Guide(Protocol):
    """What an answer may go on with, by a grammar of its own."""

    cut: bool  # whether it led to an end because tokens ran out

    def restrict(self, row: Tensor, room: int, /) -> None:
        """Set the logits [vocabulary] of all tokens that must not come next to -inf; `room` tokens may still come."""

    def accept(self, token: int) -> None:
        """The token that was chosen."""


@dataclass(frozen=True)
class Sampled:
    """One chosen token. Log-probabilities are the model's own, before temperature and cuts."""

    token: int
    logprob: float | None = None
    top: dict[int, float] = field(default_factory=dict)  # the most likely tokens, best first
    error: str | None = None  # why there is no token


class Tally:
    """How often each token stands in a growing list of them, each of which is looked at once."""

    def __init__(self, start: int = 0):
        self.read = start  # tokens that are counted, or skipped
        self.counts: Counter[int] = Counter()

    def of(self, tokens: list[int]) -> Counter[int]:
        self.counts.update(tokens[self.read :])
        self.read = len(tokens)
        return self.counts


@dataclass(eq=False)
class Sequence(Holding):
    """A prompt and what has been generated after it. Only the scheduler changes it.

    tokens      [prompt …………………………… | generated ………]
    num_cached  [K and V are stored ………|← to be computed →]     decode: one token is left
    """

    prompt: Iterable[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()  # tokens that end it: the model's EOS ids and the request's own
    guide: Guide | None = None  # what its answer may go on with
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    seed: int = field(init=False)  # its own, or one that nobody chose
    sampled: list[Sampled] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None  # what went wrong, if the reason is "error"

    max_len: int = 0  # most tokens, prompt included; set when it is added
    prefix_hit: int = 0  # prompt tokens that another sequence had computed
    preemptions: int = 0
    seen: Tally = field(default_factory=Tally)  # prompt and answer, as far as penalties have asked
    said: Tally = field(init=False)  # the answer alone

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.num_prompt = len(self.tokens)
        self.said = Tally(self.num_prompt)
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed

    @property
    def output(self) -> list[int]:
        """The generated tokens, the one that ended it included."""
        return self.tokens[self.num_prompt :]

    @property
    def answered(self) -> int:
        """The number of generated tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def pending(self) -> int:
        """Tokens whose K and V are still to be computed."""
        return len(self.tokens) - self.num_cached

    @property
    def looks_back(self) -> bool:
        """Whether what is drawn depends on the tokens before it other than through the model."""
        params = self.params
        penalized = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        return bool(self.guide or penalized or self.answered + 1 < params.min_tokens)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
