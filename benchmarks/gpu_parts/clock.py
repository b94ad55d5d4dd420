"""Times of work on a GPU: CUDA events around replays of a graph, so that launching costs nothing; contestants in turn,
the L2 cache flushed before each. On a CPU, for a dry run, the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]
FLUSH = 256 << 20  # bytes, several times any L2
COPY = 1 << 30


def captured(run: Run, device: torch.device) -> Run:
    """The same work as one launch."""
    run()
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def medians(contestants: dict[str, Run], device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds of each, the median over rounds in which all run in turn."""
    if device.type != "cuda":
        return {name: statistics.median(_wall(run) for _ in range(rounds)) for name, run in contestants.items()}
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):  # the first one warms up
        for name, run in list(contestants.items())[:: 1 if turn % 2 else -1]:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            if turn:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def copy_bandwidth(device: torch.device, nbytes: int = COPY) -> float:
    """Bytes per second of a device-to-device copy, read and written both counted."""
    source, target = (torch.ones(nbytes, dtype=torch.int8, device=device) for _ in range(2))
    (ms,) = medians({"copy": lambda: target.copy_(source)}, device, 15).values()
    return 2 * nbytes / ms * 1e3


def _wall(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
