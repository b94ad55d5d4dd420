"""How many GPUs serve so many sessions at such a rate: arithmetic on a model's geometry, nothing is run.

A replica is a model on `ranks` GPUs (octavo/parallel). Each of them holds its share of the weights and of the KV heads,
and a session that is open keeps its rows there whether it is answered at the moment or not. A decode step of b sessions
takes as long as its bytes and operations need one after the other:

    seconds = overhead + (weights + b · session) / ranks / bandwidth + 4 · layers · gather
              + b · (1 + prompt) · 2 · parameters / ranks / operations

where `prompt` is how many prompt tokens are computed for each token that is generated. With fewer KV heads than ranks a
session's rows are on several of them. Operations of attention are left out; all experts are counted.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Self

from octavo.errors import OctavoError
from octavo.measure.memory.costs import Cost, costs, weight_kinds
from octavo.models.geometry import Geometry
from octavo.quant.format import Format
from octavo.units import format_bytes

RANKS = (1, 2, 4, 8)  # GPUs of a replica that are tried, where the model can be divided so: those of one machine


@dataclass(frozen=True)
class Gpu:
    """What a GPU is assumed to have and to reach: by default NVIDIA's data sheet of the H100 SXM (80 GB, 3.35 TB/s, 989
    TFLOP/s in 16 bits), and shares of it that served models are seen to reach."""

    memory: int = 80 * 10**9
    kept: float = 0.1  # share of the memory held back for activations, graphs and the runtime
    bandwidth: float = 3.35e12  # bytes a second
    streamed: float = 0.7  # share of it that a decode step reaches
    operations: float = 989e12  # a second
    computed: float = 0.5  # share of them that products reach
    gather: float = 10e-6  # seconds, between the GPUs of one machine
    overhead: float = 1e-3  # seconds of a step on the host

    def having(self, memory: int, reserve: int, bandwidth: float | None) -> Self:
        """The same with what is said of one: bytes of memory, those held back for the runtime, and TB/s; 0, 0 and None
        leave what is assumed. Raises OctavoError where no memory is left."""
        memory = memory or self.memory
        if reserve >= memory:
            raise OctavoError(f"--reserve {format_bytes(reserve)} leaves nothing of a GPU's {format_bytes(memory)}")
        rate = self.bandwidth if bandwidth is None else 1e12 * bandwidth
        return replace(self, memory=memory, kept=reserve / memory or self.kept, bandwidth=rate)


@dataclass(frozen=True)
class Wanted:
    """What is to be served."""

    sessions: int  # open at a time
    context: int  # tokens of each
    tokens_per_second: float  # generated, of all sessions together
    prompt: float = 1.0  # prompt tokens that are computed for each generated one, prefix hits left out

    @classmethod
    def of(cls, sessions: int, context: int, tokens_per_second: float | None, prompt: float | None) -> Self:
        """None: a token a second for each session, and what is assumed of prompts."""
        rate = float(sessions) if tokens_per_second is None else tokens_per_second
        return cls(sessions, context, rate, cls.prompt if prompt is None else prompt)


@dataclass(frozen=True)
class Fleet:
    """The fewest GPUs for one kind of weights and one cache format; bytes and seconds."""

    weights: str
    kv: str
    ranks: int  # GPUs of a replica
    replicas: int
    sessions: int  # that a replica has room for
    running: int  # of them answered at a time at the wanted rate
    step: float  # seconds of a decode step of those
    most: float  # tokens a second of the whole fleet, were all its sessions answered at once
    weight_bytes: int  # on each GPU
    session_bytes: int  # of a session in all GPUs of a replica

    @property
    def gpus(self) -> int:
        return self.ranks * self.replicas

    def document(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return vars(self) | {"gpus": self.gpus}


def fleets(geometry: Geometry, formats: Sequence[Format], wanted: Wanted, gpu: Gpu | None = None) -> list[Fleet]:
    """For each kind of weights, each format that can be served so. Raises OctavoError where none can be."""
    gpu = gpu or Gpu()
    kinds, tried = list(weight_kinds(geometry)), [ranks for ranks in RANKS if ranks in geometry.ranks]
    every = costs(geometry, formats, wanted.context, gpu.memory, kinds)
    found = [fleet for cost in every if (fleet := _smallest(geometry, cost, wanted, gpu, tried)) is not None]
    if not found:
        raise OctavoError(
            f"no replica of {' or '.join(map(str, tried))} such GPUs holds the model with one session of "
            f"{wanted.context:,} tokens and answers it that fast: lower --context or --tokens-per-second, or name GPUs "
            "with more --memory"
        )
    return found


def _smallest(geometry: Geometry, cost: Cost, wanted: Wanted, gpu: Gpu, tried: Sequence[int]) -> Fleet | None:
    options = [_of(geometry, cost, wanted, gpu, ranks) for ranks in tried]
    return min(
        (fleet for fleet in options if fleet is not None), key=lambda fleet: (fleet.gpus, fleet.ranks), default=None
    )


def _of(geometry: Geometry, cost: Cost, wanted: Wanted, gpu: Gpu, ranks: int) -> Fleet | None:
    kv_heads = min((shape.kv_heads for shape in geometry.shapes if shape.shares is None), default=1)
    copies = max(1, ranks // kv_heads)  # of each session's rows
    session, spare = copies * cost.session, copies * cost.spare
    room = int(ranks * gpu.memory * (1 - gpu.kept)) - cost.weight_bytes - spare
    holds = room // session
    if holds < 1:
        return None

    def seconds(running: int) -> float:
        read = (cost.weight_bytes + running * session) / ranks / (gpu.bandwidth * gpu.streamed)
        products = running * (1 + wanted.prompt) * 2 * geometry.parameters / ranks / (gpu.operations * gpu.computed)
        meeting = 4 * len(geometry.shapes) * gpu.gather if ranks > 1 else 0.0
        return gpu.overhead + read + meeting + products

    def rate(replicas: int) -> float:  # were all answered at once
        return wanted.sessions / seconds(ceil(wanted.sessions / replicas))

    fewest = ceil(wanted.sessions / holds)
    more = range(fewest, wanted.sessions + 1)
    at = bisect_left(more, wanted.tokens_per_second, key=rate)
    if at == len(more):
        return None
    replicas = more[at]
    each = ceil(wanted.sessions / replicas)
    share = wanted.tokens_per_second / replicas
    running = 1 + bisect_left(range(1, each), share, key=lambda running: running / seconds(running))
    return Fleet(
        cost.weights, cost.format, ranks, replicas, holds, running, seconds(running), rate(replicas),
        cost.weight_bytes // ranks, session,
    )  # fmt: skip
