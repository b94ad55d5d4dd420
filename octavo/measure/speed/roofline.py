"""The fastest a decode step can be: the bytes it must read over the machine's bandwidth.

A step reads every weight once and the rows of every session's whole context. Both are counted, from the tensors and
from the format; the bandwidth is measured here, by a plain streaming read in the same run as what it is compared with.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.cache.size import BLOCK_SIZE
from octavo.devices import device_of
from octavo.measure.candidate import Candidate
from octavo.models.bind import BoundModel
from octavo.models.packed import weight_bytes
from octavo.quant.format import Format, by_layer

READ_BYTES = 1 << 30  # of the streaming read: several times any cache


@dataclass(frozen=True)
class Ceiling:
    """Computed: what a decode step has to read, and the tokens per second if it did nothing else."""

    kv: str
    batch_size: int
    context: int
    weight_bytes: int
    cache_bytes: int
    decode: float  # tokens per second


def bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second of a plain streaming read over an array larger than the caches: the best of a few."""
    values = min(READ_BYTES, device_of(device).free_memory() // 8) // 4
    array = torch.ones(values, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        array.sum().item()
        best = min(best, time.perf_counter() - start)
    return array.nbytes / best


def read_bytes(bound: BoundModel) -> int:
    """What a step reads of the weights: all of them, but for an input embedding of its own (only rows of it are read).
    A mixture of experts reads fewer in a small batch, and can then beat this ceiling."""
    inputs, outputs = bound.hf.get_input_embeddings(), bound.hf.get_output_embeddings()
    tied = outputs is not None and inputs.weight is getattr(outputs, "weight", None)
    return weight_bytes(bound.hf) - (0 if tied else inputs.weight.nbytes)


def cache_bytes(bound: BoundModel, format: Format, context: int) -> int:
    """What a decode step reads of one session's codes, token scales and, at edges, raw rows: those of page 0 and half
    an own span. A layer with a window reads that far back, and states are read and written."""
    each = by_layer(format, len(bound.shapes))

    def of_layer(layer: int, window: int | None) -> int:
        shared = bound.shapes[layer].shares
        owner = layer if shared is None else shared
        shape, own, seen = bound.shapes[owner], each[owner], min(context, window or context)
        page_0 = max(0, seen - max(0, context - BLOCK_SIZE))  # of its rows those that a window reaches
        raw = min(seen, page_0 + own.edges // 2) if own.edges else 0
        return shape.token_bytes(own) * (seen - raw) + shape.raw_token_bytes(own) * raw

    return sum(of_layer(i, layer.window) for i, layer in enumerate(bound.layers)) + 2 * bound.states.nbytes


def ceilings(
    bound: BoundModel,
    candidates: Sequence[Candidate],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    tokens: int,
    rate: float,
) -> list[Ceiling]:
    """The theory: for every cell and candidate, at the mean context of the decode steps that are measured."""
    found = []
    for context in contexts:
        for batch_size in batch_sizes:
            for candidate in candidates:
                own = candidate.model.bound if candidate.model else bound
                weights, mean = read_bytes(own), context - tokens // 2
                read = batch_size * cache_bytes(own, candidate.format, mean)
                decode = batch_size * rate / (weights + read)
                found.append(Ceiling(candidate.name, batch_size, context, weights, read, decode))
    return found
