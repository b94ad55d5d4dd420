"""Looking up a value by its key in a long context: what a cache format makes of it, by where in the context it stands.

A context is a list of lines like `amber falcon 7: 4831`, and a question is one of the keys again: the model has to find
one line among hundreds and copy its value, which even small models can. All questions of a context begin with the same
tokens, so the context is read once for each format. Right is a value whose every token is the likeliest one; its
log-probability tells earlier than that what is lost.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any

from octavo.measure.candidate import Candidate
from octavo.measure.statistics import standard_error
from octavo.measure.tasks.loglikelihood import Request, Scored, score
from octavo.models.model import Model
from octavo.progress import Progress, silent
from octavo.text import opening

QUESTIONS = 24  # of each context, spread evenly over it
LEAST = 512  # tokens of a context that has lines enough to ask about
DEPTHS = 4  # parts of a context that rights are counted in
FIRST = ("amber", "brass", "coral", "dusky", "frost", "grand", "ivory", "lunar", "misty", "noble", "olive", "rusty")
SECOND = ("acorn", "badge", "candle", "dragon", "engine", "falcon", "garden", "island", "kettle", "mirror", "orchid")


@dataclass(frozen=True)
class Context:
    """A list of keys and values as tokens, and questions about it."""

    tokens: list[int]
    questions: list[Request]  # each the whole context, a key and its value
    depths: list[float]  # where the line of each stands: 0 the beginning, 1 the end


@dataclass(frozen=True)
class Retrieval:
    """One format on the contexts of one length; ± are standard errors over questions."""

    name: str
    length: int  # tokens of a context, at most
    questions: int
    right: float  # share of the values that are found
    right_by_depth: list[float]  # of those in each of DEPTHS parts, the beginning first
    logprob: float  # of a value, nats, mean
    change: float  # of the log-probability from the baseline's, mean
    change_error: float  # paired
    lost: int  # values that the baseline finds and this format does not
    gained: int


def make_context(tokenizer: Any, length: int, questions: int = QUESTIONS) -> Context:
    """A list of keys and values, of at most `length` tokens with a question and its answer; always the same one."""
    chance = random.Random("0 0")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def key() -> str:
        return f"{chance.choice(FIRST)} {chance.choice(SECOND)} {chance.randrange(100)}"

    tokens = opening(tokenizer) + encode("A list of names and their numbers.\n\n")
    known: dict[str, tuple[str, int]] = {}  # key → value, and where its line begins
    room = length - len(tokens) - 2 * len(encode("grand orchid 99: 1234\n"))
    while room > 0:
        name, value = key(), str(chance.randrange(1000, 10000))
        if name in known:
            continue
        line = encode(f"{name}: {value}\n")
        known[name] = value, len(tokens)
        tokens += line
        room -= len(line)
    names = list(known)
    asked = [names[(2 * i + 1) * len(names) // (2 * questions)] for i in range(questions)]
    chance.shuffle(asked)
    return Context(
        tokens,
        [Request([*tokens, *encode(f"\n{name}:")], encode(f" {known[name][0]}")) for name in asked],
        [known[name][1] / len(tokens) for name in asked],
    )


def retrieve(
    model: Model,
    candidates: Sequence[Candidate],
    asked: Context,
    length: int,
    progress: Progress = silent,
) -> list[Retrieval]:
    """How well each candidate, the first of which is the baseline, looks up values in a context of at most `length`
    tokens."""
    requests, depths = asked.questions, asked.depths
    first, found = None, []
    for i, candidate in enumerate(candidates):
        title, total = f"looking up values in {length:,} tokens", len(candidates) * len(requests)

        def tell(done: int, before: int = i * len(requests), title: str = title, total: int = total) -> None:
            progress(title, before + done, total)

        llm = candidate.llm(model, session_len=min(length, model.bound.max_context), max_batch_size=2)
        scored = score(llm.engine, requests, tell)
        first = first or scored
        found.append(_summary(candidate.name, length, depths, scored, first))
    return found


def _summary(
    name: str, length: int, depths: Sequence[float], scored: Sequence[Scored], base: Sequence[Scored]
) -> Retrieval:
    changes = [own.logprob - old.logprob for own, old in zip(scored, base, strict=True)]
    rights: list[list[float]] = [[] for _ in range(DEPTHS)]
    for depth, own in zip(depths, scored, strict=True):
        rights[min(DEPTHS - 1, int(DEPTHS * depth))].append(own.greedy)
    return Retrieval(
        name=name,
        length=length,
        questions=len(scored),
        right=mean([own.greedy for own in scored]),
        right_by_depth=[mean(part) for part in rights],
        logprob=mean([own.logprob for own in scored]),
        change=mean(changes),
        change_error=standard_error(changes),
        lost=sum(old.greedy and not own.greedy for own, old in zip(scored, base, strict=True)),
        gained=sum(own.greedy and not old.greedy for own, old in zip(scored, base, strict=True)),
    )
