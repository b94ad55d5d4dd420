"""How fast the cache's formats are, as the engine serves them.

Sessions are submitted together; their prompts are computed in chunks (prefill), then every step gives each of them one
token (decode). In every round all formats run in turn on the same prompts, every other round in reverse, and what is
compared is a format's ratio to the first one within its round: a machine that slows down for a minute slows both.
Beside each number stands its ceiling (roofline.py): the fastest that memory allows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from octavo.cache.size import CacheSize
from octavo.devices import device_of
from octavo.engine.params import SamplingParams
from octavo.engine.scheduler import CHUNK_TOKENS
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.measure.candidate import Candidate
from octavo.measure.speed.roofline import Ceiling
from octavo.models.model import Model
from octavo.progress import Count, silent
from octavo.units import format_bytes


@dataclass(frozen=True)
class Latency:
    """Seconds, nearest-rank percentiles of n values."""

    p50: float
    p99: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        ordered = sorted(seconds)
        n = len(ordered)
        p50, p99 = (ordered[max(0, -(-n * percent // 100) - 1)] for percent in (50, 99))
        return cls(p50, p99, n)


@dataclass(frozen=True)
class Ratio:
    """To the first format, round by round: the median of the rounds and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, own: Sequence[float], first: Sequence[float]) -> Ratio:
        ratios = [a / b for a, b in zip(own, first, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Speed:
    """Measured: one format at one batch size and context. Tokens per second are medians over rounds."""

    kv: str
    batch_size: int
    context: int
    prefill: float
    decode: float
    first_token: Latency  # from submitting all sessions at once
    per_token: Latency  # of decode steps with all sessions running
    prefill_ratio: Ratio
    decode_ratio: Ratio
    ceiling: float  # share of the ceiling that decode reaches


@dataclass
class _Rounds:
    """What one format did, round by round."""

    llm: LLM
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def step_tokens(batch_size: int) -> int:
    """The most tokens of a step: large batches still leave most of it to prompts."""
    return max(CHUNK_TOKENS, 8 * batch_size)


def prompt_length(batch_size: int, context: int, tokens: int) -> int:
    """Tokens of each prompt, so that sessions fill `context` with their last token and none ends before."""
    # While later prompts are computed, the earlier sessions decode already.
    chunks = -(-batch_size * context // (step_tokens(batch_size) - batch_size))
    return context - tokens - chunks - 1


def check(model: Model, batch_sizes: Sequence[int], contexts: Sequence[int], tokens: int) -> None:
    """Raise OctavoError for cells that cannot be measured."""
    for context in contexts:
        if context > model.bound.max_context:
            raise OctavoError(
                f"a context of {context} is beyond the model's {model.bound.max_context}: lower --context"
            )
        for batch_size in batch_sizes:
            if prompt_length(batch_size, context, tokens) < 1:
                raise OctavoError(
                    f"a context of {context} has no room for a prompt and {tokens} tokens at batch size {batch_size}: "
                    "lower --tokens or --batch-size, or raise --context"
                )


def measure(
    model: Model,
    candidates: Sequence[Candidate],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    theory: Sequence[Ceiling],
    *,
    tokens: int = 32,
    rounds: int = 3,
    progress: Count = silent,
) -> list[Speed]:
    """Every candidate over batch sizes and contexts; ratios are to the first. `theory` is of `ceilings`;
    `progress` is called with the number of runs done and of all, `rounds` for each cell and format."""
    check(model, batch_sizes, contexts, tokens)
    generator = torch.Generator().manual_seed(0)
    limits = {(c.kv, c.batch_size, c.context): c.decode for c in theory}
    done, total, found = 0, rounds * len(contexts) * len(batch_sizes) * len(candidates), []
    for context in contexts:
        for batch_size in batch_sizes:
            length = prompt_length(batch_size, context, tokens)
            runs = {c.name: _Rounds(_prepare(model, c, batch_size, context)) for c in candidates}
            for turn in range(rounds):
                prompts = torch.randint(model.bound.vocab_size, (batch_size, length), generator=generator).tolist()
                for run in list(runs.values())[:: 1 if turn % 2 == 0 else -1]:
                    _session(run, prompts, tokens)
                    done += 1
                    progress(done, total)
            first = runs[candidates[0].name]
            found += [_speed(name, batch_size, context, run, first, limits) for name, run in runs.items()]
    return found


def _prepare(model: Model, candidate: Candidate, batch_size: int, context: int) -> LLM:
    """An LLM whose cache holds all sessions, every page of it touched, and the first call behind it."""
    bound = (candidate.model or model).bound
    size = CacheSize.of(bound.shapes, candidate.format, step=step_tokens(batch_size), states=bound.states, snapshots=0)
    blocks = batch_size * -(-context // size.block_size)
    needed = size.cache(blocks, batch_size)
    llm = candidate.llm(
        model,
        session_len=context,
        max_batch_size=batch_size,
        max_batch_tokens=step_tokens(batch_size),
        # The first cache would take the whole of a GPU, and those of the other formats stand beside it.
        kv_cache_memory=needed if device_of(bound.device).dedicated else None,
        prefix_caching=False,
    )
    if llm.cache.num_blocks < size.pools(blocks, batch_size)[0]:
        wanted, allowed = format_bytes(needed), format_bytes(llm.cache.nbytes)
        raise OctavoError(
            f"{batch_size} sessions of {context} tokens take {wanted} in {candidate.name}, and {allowed} may be taken: "
            "lower --batch-size or --context"
        )
    for store in llm.cache.stores:
        store.codes.fill_(0)
    llm.generate([[0] * min(8, context - 3)], SamplingParams(max_tokens=2, ignore_eos=True))
    return llm


def _session(run: _Rounds, prompts: list[list[int]], tokens: int) -> None:
    """One round: submit all prompts, step until each has its first token, then `tokens` steps more."""
    engine, llm = run.llm.engine, run.llm
    params = SamplingParams(max_tokens=llm.session_len, ignore_eos=True)
    sequences = [llm.sequence(prompt, params) for prompt in prompts]
    start = now = time.perf_counter()
    for sequence in sequences:
        engine.add(sequence)
    waiting = len(sequences)
    try:
        while waiting:
            gained = engine.step()
            now = time.perf_counter()
            new = sum(len(sequence.sampled) == 1 for sequence in gained)
            run.first += [now - start] * new
            waiting -= new
        run.prefill.append(sum(map(len, prompts)) / (now - start))
        begin = now
        for _ in range(tokens):
            before = now
            engine.step()
            now = time.perf_counter()
            run.steps.append(now - before)
        run.decode.append(len(prompts) * tokens / (now - begin))
    finally:  # an interrupt leaves nothing behind
        for sequence in sequences:
            engine.finish(sequence)


def _speed(
    name: str, batch_size: int, context: int, run: _Rounds, first: _Rounds, limits: dict[tuple[str, int, int], float]
) -> Speed:
    decode = statistics.median(run.decode)
    return Speed(
        kv=name,
        batch_size=batch_size,
        context=context,
        prefill=statistics.median(run.prefill),
        decode=decode,
        first_token=Latency.of(run.first),
        per_token=Latency.of(run.steps),
        prefill_ratio=Ratio.of(run.prefill, first.prefill),
        decode_ratio=Ratio.of(run.decode, first.decode),
        ceiling=decode / limits[name, batch_size, context],
    )
