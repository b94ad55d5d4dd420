"""Log-probabilities of given continuations, on an idle engine's model, cache and blocks.

The rows of many texts are packed into steps as the engine packs them, their codes are written and then read, and the
prefix cache is shared with it: a score is that of served generation. What it does not share is the schedule: nothing is
sampled, and a prefix hit ends before the first row whose prediction is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from octavo.cache.batch import Batch
from octavo.cache.holding import Holding
from octavo.engine.engine import Engine
from octavo.errors import OctavoError
from octavo.progress import silent


class Request(NamedTuple):
    """Token ids; neither part is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Scored(NamedTuple):
    logprob: float  # of the continuation after the context, nats
    greedy: bool  # every token of it is the most likely one


@dataclass(eq=False, kw_only=True)
class _Text(Holding):
    """A request as a sequence: its last token is predicted, never computed.

    context …………… | continuation ………
    tokens  […………………………………………]
                [rows whose predictions are scored], from `first` on
    """

    index: int  # of the request
    first: int
    targets: list[int]
    logprob: float = 0.0
    greedy: bool = True

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.num_cached


def score(engine: Engine, requests: Sequence[Request], progress: Callable[[int], None] = silent) -> list[Scored]:
    """Scores in the requests' order; `progress` is called with the number of them done.

    A context too long for a session loses its beginning, as in other backends.
    """
    if engine.busy:
        raise ValueError("the engine has requests to answer: score texts before them, after them, or with another LLM")
    room = engine.scheduler.max_context
    results: dict[int, Scored] = {}
    for texts in _steps([_text(i, request, room) for i, request in enumerate(requests)], engine):
        _run(engine, texts)
        results |= {text.index: Scored(text.logprob, text.greedy) for text in texts}
        progress(len(results))
    return [results[i] for i in range(len(requests))]


def _text(index: int, request: Request, room: int) -> _Text:
    context, continuation = list(request.context), list(request.continuation)
    if len(continuation) > room:
        raise OctavoError(
            f"a continuation of {len(continuation)} tokens cannot be scored in a session of {room}: "
            "raise --session-len, or enlarge the cache with --kv-cache-memory"
        )
    tokens = [*context, *continuation][-(room + 1) : -1]
    return _Text(tokens=tokens, index=index, first=len(tokens) - len(continuation), targets=continuation)


def _steps(texts: list[_Text], engine: Engine) -> Iterator[list[_Text]]:
    """Texts to be run together: a text that begins as another does comes a step after it, whose blocks it shares.
    Longest first, so that time estimates err on the long side."""
    contexts: dict[tuple[int, ...], list[_Text]] = {}
    for text in sorted(texts, key=lambda text: -len(text.tokens)):
        contexts.setdefault(tuple(text.tokens[: text.first + 1]), []).append(text)
    groups, width = list(contexts.values()), engine.scheduler.max_batch_size
    step: list[_Text] = []
    read: set[tuple[int, ...]] = set()  # first blocks of texts of the steps before
    block = engine.pool.block_size
    for start in range(0, len(groups), width):
        wave = groups[start : start + width]
        for turn in range(max(map(len, wave))):
            for text in (group[turn] for group in wave if turn < len(group)):
                begins = {tuple(other.tokens[:block]) for other in step}
                waits = tuple(text.tokens[:block]) in begins - read and text.first >= block
                if step and (waits or not _fits([*step, text], engine)):
                    yield step
                    read |= begins
                    step = []
                step.append(text)
            yield step
            read |= {tuple(other.tokens[:block]) for other in step}
            step = []


def _fits(step: list[_Text], engine: Engine) -> bool:
    blocks = sum(engine.pool.blocks_for(len(text.tokens)) for text in step)
    tokens = sum(len(text.tokens) for text in step)
    return tokens <= engine.scheduler.max_batch_tokens and blocks <= len(engine.pool)


def _run(engine: Engine, texts: list[_Text]) -> None:
    pool = engine.pool
    try:
        for text in texts:
            pool.start(text, pool.match(text.tokens[: text.first + 1]))
        while any(text.pending for text in texts):
            work, budget = [], engine.scheduler.max_batch_tokens
            for text in texts:
                if rows := min(text.pending, budget):
                    if not pool.reserve(text, rows):
                        raise AssertionError("a step's texts fit into the cache")
                    work.append((text, rows))
                    budget -= rows
            _forward(engine, work)
    finally:
        for text in texts:
            if text.tables:
                pool.free_all(text)


def _forward(engine: Engine, work: list[tuple[_Text, int]]) -> None:
    """One step of the model, and what it says about the continuations' tokens."""
    rows: list[int] = []  # of the step
    targets: list[int] = []
    owners: list[tuple[_Text, int]] = []  # whose, and how many
    start = 0
    for text, count in work:
        end = text.num_cached + count
        scored = range(max(text.num_cached, text.first), end)
        rows += [start + position - text.num_cached for position in scored]
        targets += [text.targets[position - text.first] for position in scored]
        owners.append((text, len(scored)))
        start += count
    cache = engine.cache
    batch = Batch.build(work, engine.pool.block_size, span=cache.span, states=cache.states is not None)
    logits = engine.runner.run(replace(batch, logits_at=torch.tensor(rows, dtype=torch.int64)))
    wanted = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    logprobs = logits.float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    best = logits.argmax(-1) == wanted

    done = 0
    for (text, count), (_, computed) in zip(owners, work, strict=True):
        text.logprob += logprobs[done : done + count].sum().item()
        text.greedy &= bool(best[done : done + count].all())
        done += count
        text.num_cached += computed
        engine.pool.seal_full(text)
