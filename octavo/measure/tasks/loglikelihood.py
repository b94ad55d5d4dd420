"""Log-probabilities of given continuations, on an idle engine's model, cache and blocks.

The rows of many texts are packed into steps as the engine packs them, their codes are written and then read, and the
prefix cache is shared with it: a score is that of served generation. What it does not share is the schedule: nothing is
sampled, and a prefix hit ends before the first row whose prediction is scored.

Texts that begin alike are a family. What they share, examples or a long document, is computed once and stays while they
are scored; each begins with a copy of it, its last block included, which the prefix cache would not have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

import torch

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

    @property
    def context(self) -> tuple[int, ...]:
        return tuple(self.tokens[: self.first + 1])


def score(engine: Engine, requests: Sequence[Request], progress: Callable[[int], None] = silent) -> list[Scored]:
    """Scores in the requests' order; `progress` is called with the number of them done.

    A context too long for a session loses its beginning, as in other backends.
    """
    if engine.busy:
        raise ValueError("the engine has requests to answer: score texts before them, after them, or with another LLM")
    room = engine.scheduler.max_context
    results: dict[int, Scored] = {}
    for shared, family in _families([_text(i, request, room) for i, request in enumerate(requests)], engine):
        stem = [_Text(tokens=shared, index=-1, first=len(shared), targets=[])] if shared else []
        with _running(engine, stem):
            _compute(engine, stem)
            for texts in _steps(family, engine, shared):
                with _running(engine, texts, *stem):
                    _compute(engine, texts)
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


def _families(texts: list[_Text], engine: Engine) -> list[tuple[list[int], list[_Text]]]:
    """Texts of several contexts with the same first block, each with the tokens that all of them share and none scores;
    then the others, which share none. Longest first, so that time estimates err on the long side."""
    size, families = engine.pool.block_size, []
    texts = sorted(texts, key=lambda text: -len(text.tokens))
    alike: dict[tuple[int, ...], list[_Text]] = {}
    for text in texts:
        alike.setdefault(tuple(text.tokens[: min(size, text.first)]), []).append(text)
    for begin, own in alike.items():
        heads = [text.tokens[: text.first] for text in own]
        pairs = zip(min(heads), max(heads), strict=False)  # the first and the last of all differ soonest
        shared = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        blocks = engine.pool.groups[0]
        room = blocks.blocks_for(len(shared)) + blocks.blocks_for(len(own[0].tokens)) <= len(blocks)
        if len(begin) == size and len({text.context for text in own}) > 1 and room and _width(engine, shared):
            families.append((shared, own))
    apart = {text.index for _, own in families for text in own}
    return [*families, ([], [text for text in texts if text.index not in apart])]


def _width(engine: Engine, shared: list[int]) -> int:
    """How many texts run at a time: what is shared takes a sequence's place."""
    return engine.scheduler.max_batch_size - bool(shared)


def _steps(texts: list[_Text], engine: Engine, shared: list[int]) -> Iterator[list[_Text]]:
    """Texts to be run together: of those with one context each comes a step after the other, whose blocks it shares."""
    pool, width = engine.pool, _width(engine, shared)
    contexts: dict[tuple[int, ...], list[_Text]] = {}
    for text in texts:
        contexts.setdefault(text.context, []).append(text)
    groups = list(contexts.values())
    for start in range(0, len(groups), width):
        wave = groups[start : start + width]
        for turn in range(max(map(len, wave))):
            step: list[_Text] = []
            for text in (group[turn] for group in wave if turn < len(group)):
                lengths = (len(tokens) for tokens in (shared, text.tokens, *(own.tokens for own in step)))
                if step and sum(map(pool.blocks_for, lengths)) > len(pool.groups[0]):
                    yield step
                    step = []
                step.append(text)
            yield step


@contextmanager
def _running(engine: Engine, texts: list[_Text], stem: _Text | None = None) -> Iterator[None]:
    """Texts in the cache, as far as they are cached, or `stem` has their rows, which all of them begin with."""
    pool = engine.pool
    try:
        for text in texts:
            pool.start(text, pool.match(text.tokens[: text.first + 1]))
            if stem is not None and text.num_cached < stem.num_cached:
                _copy(engine, stem, text)
        yield
    finally:
        for text in texts:
            if text.tables:
                pool.free_all(text)


def _copy(engine: Engine, stem: _Text, text: _Text) -> None:
    """Have the rows of `stem` in `text` that no hit has given it. Of layers with a window both have the last ones."""
    cache, pool, found = engine.cache, engine.pool, len(text.prefixes)
    text.num_cached = stem.num_cached
    _reserve(engine, text, 0)
    starts = [max(found, behind) for behind in text.behind]  # of each group

    def pages(held: _Text) -> list[list[int]]:
        """Of each of the cache's paged stores."""
        raw = [held.first_page, *range(held.ring, held.ring + cache.span // pool.block_size)]
        tables = [held.tables[group][start:] for group, start in enumerate(starts)]
        layers = [(tables[cache.group_of[i]], layer.raw) for i, layer in cache.owners]
        return [own for table, edges in layers for own in (table, table, *((raw, raw) if edges else ()))]

    cache.write_pages(pages(text), cache.read_pages(pages(stem)))
    if cache.states is not None and stem.state_slot is not None and text.state_slot is not None:
        cache.states.copy(stem.state_slot, text.state_slot)
    pool.seal_full(text)


def _reserve(engine: Engine, text: _Text, rows: int) -> None:
    """Give back what the text no longer sees, and take blocks for its next rows."""
    if not engine.pool.reserve(text, rows):
        raise AssertionError("a step's texts fit into the cache")


def _compute(engine: Engine, texts: list[_Text]) -> None:
    """The rows of `texts` that are not cached."""
    while any(text.pending for text in texts):
        work, budget = [], engine.scheduler.max_batch_tokens
        for text in texts:
            rows = min(text.pending, budget)
            _reserve(engine, text, rows)
            if rows:
                work.append((text, rows))
                budget -= rows
        _forward(engine, work)
    for text in texts:
        _reserve(engine, text, 0)


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
    batch = engine.cache.batch(work)
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
