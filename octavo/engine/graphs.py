"""Decode steps as CUDA graphs: a step is one launch instead of one for each kernel.

A step in which every sequence computes one token has the same shape whatever its sequences, but for their number. So it
is captured once for each of a few sizes, over buffers that stay where they are, and a step is copied into them and
padded to the next size. A padded row has slot −1 (writes nowhere) and length 0 (sees nothing); nobody reads its logits.

Only `capture` needs a GPU. On a CPU the same buffers are run as they are, which is how padding is tested.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.devices import HOST, device_of
from octavo.errors import one_line

Forward = Callable[[Batch], Tensor]
Replay = Callable[[], Tensor]
Capture = Callable[[Replay], Replay]


def sizes(most: int) -> list[int]:
    """Rows of the captured steps: 1, 2, 4, 8, 16, 24, … and `most`."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most})


class NotCapturable(Exception):
    """Decode steps of this model cannot be captured; the message says why."""


class StepBuffers:
    """Memory of one decode step of up to `rows` sequences with tables of up to `width` blocks, for each of `groups`
    groups of layers. It never moves."""

    def __init__(
        self,
        rows: int,
        width: int,
        block_size: int,
        device: torch.device,
        edges: bool = False,
        groups: int = 1,
        states: bool = False,
    ):
        self.rows, self.width, self.block_size, self.groups = rows, width, block_size, groups
        of_rows = ("ids", "positions", "kv_len", *(("raw_slots", "first", "ring") if edges else ()))
        of_rows += ("state_slots",) if states else ()
        self.names = (*of_rows, *(f"slots {group}" for group in range(groups)))
        self.memory = torch.zeros(rows * (len(self.names) + groups * width), dtype=torch.int64, device=device)
        self.places = torch.arange(rows + 1, device=device)

    def load(self, batch: Batch, size: int) -> None:
        """Copy a decode step in, padded to `size` rows: everything of the host in one copy, for which the device's
        queue does not stop."""
        n, used = len(batch.q_lens), len(self.names) * self.rows + self.groups * size * self.width
        here = self.memory.device == HOST
        host = self.memory if here else device_of(self.memory.device).pinned(torch.Size([used]), torch.int64)
        columns, tables = self._parts(host, size)
        if n < size or not here:
            host.zero_()
            for name in columns:
                if "slots" in name:
                    columns[name].fill_(-1)
        sampled = batch.ids.device != HOST  # by the step before, and never seen by the host
        for name, column in columns.items():
            field, _, of = name.partition(" ")
            if name != "ids" or not sampled:
                column[:n] = getattr(batch.of(int(of or 0)), field)
        for group, table in enumerate(tables):
            own = batch.of(group).block_table
            table[:n, : own.shape[1]] = own
        if not here:
            self.memory[:used].copy_(host, non_blocking=True)
        if sampled:
            self.memory[:n] = batch.ids

    def batch(self, size: int) -> Batch:
        """The step of `size` rows that lies here. Its lengths on the host are the longest that can."""
        columns, tables = self._parts(self.memory, size)
        slots = [columns.pop(f"slots {group}")[:size] for group in range(self.groups)]
        batch = Batch(
            **{name: column[:size] for name, column in columns.items()},  # type: ignore[arg-type]
            slots=slots[0],
            block_table=tables[0],
            q_start=self.places[: size + 1],
            q_lens=[1] * size,
            kv_lens=[self.width * self.block_size] * size,
            logits_at=self.places[:size],
            fixed=True,
        )
        return batch.beside(slots[1:], list(tables[1:]))

    def holds(self, batch: Batch) -> bool:
        """Whether this is a decode step of all its sequences, and not too large."""
        rows, width = batch.block_table.shape
        fits = rows <= self.rows and width <= self.width
        return fits and len(batch.positions) == rows == len(batch.logits_at)

    def clear(self) -> None:
        """A step of padded rows alone."""
        self.memory.zero_()
        for name, column in self._parts(self.memory, self.rows)[0].items():
            if "slots" in name:
                column.fill_(-1)

    def _parts(self, memory: Tensor, size: int) -> tuple[dict[str, Tensor], Tensor]:
        """What a batch has by row, each [rows], and the block tables [groups, size, width]."""
        columns = memory[: len(self.names) * self.rows].view(len(self.names), self.rows)
        tables = memory[columns.numel() :][: self.groups * size * self.width]
        return dict(zip(self.names, columns, strict=True)), tables.view(self.groups, size, self.width)


class DecodeGraphs:
    """The model's forward over steps of so many rows, no more than `buffers` can hold, captured."""

    def __init__(self, forward: Forward, buffers: StepBuffers, capture: Capture, rows: Iterable[int]):
        self.buffers = buffers
        self.replays: dict[int, Replay] = {}
        buffers.clear()
        for size in sorted(rows, reverse=True):  # the largest first: the others fit in its memory
            # A new Batch for every run: what attention derives from one (its plan) must be derived within the capture.
            self.replays[size] = capture(partial(self._padded, forward, size))

    def _padded(self, forward: Forward, size: int) -> Tensor:
        return forward(self.buffers.batch(size))

    def takes(self, batch: Batch) -> bool:
        """Whether this is a step that they can hold."""
        return self.buffers.holds(batch)

    def run(self, batch: Batch) -> Tensor:
        """Logits [sequences, vocabulary]; they stay until the next step of the same size."""
        rows = len(batch.q_lens)
        size = min(size for size in self.replays if size >= rows)
        self.buffers.load(batch, size)
        return self.replays[size]()[:rows]


def cuda_capture(device: torch.device) -> Capture:
    """Captures into CUDA graphs that share one pool of memory and are replayed one at a time, in order.

    A step is run once as it is, where its errors are its own. Whatever then fails in the capture (a wait for the
    device, too little memory, an operation that CUDA refuses) raises NotCapturable with the reason.
    """
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(run: Replay) -> Replay:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                run()  # compiles kernels and fills caches
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads, with engines of their own, may wait for the device meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    out = run()
            except Exception as error:
                raise NotCapturable(one_line(error)) from error

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture
