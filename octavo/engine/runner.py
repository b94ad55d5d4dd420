"""Runs the model over one step's batch: every layer's attention writes its codes and reads the cache."""

import warnings
from collections.abc import Iterable

from torch import Tensor

from octavo.attention import backend_of
from octavo.cache.batch import Batch
from octavo.cache.store import KVCache
from octavo.engine.graphs import Capture, DecodeGraphs, NotCapturable, StepBuffers, cuda_capture, sizes
from octavo.engine.tapes import LONGEST, MOST, DecodeTapes
from octavo.models.bind import BoundModel


class Runner:
    """A model on a cache. Several runners may share a model, each with a cache of its own format."""

    def __init__(self, model: BoundModel, cache: KVCache):
        self.model, self.cache = model, cache
        self.graphs: DecodeGraphs | DecodeTapes | None = None

    def run(self, batch: Batch) -> Tensor:
        """Logits [sequences whose next token is due, vocabulary], in the model's dtype, where the model is: on a GPU
        they are still being computed."""
        if self.graphs is not None and self.graphs.takes(batch):
            written = [store.written for store in self.cache.stores]
            logits = self.graphs.run(batch)
            for store, before in zip(self.cache.stores, written, strict=True):  # the host may see some of it, or none
                store.written = before + len(batch.q_lens) * store.heads * store.dim
            return logits
        return self._forward(batch)

    def capture(self, max_batch_size: int, max_context: int, how: Capture | None = None) -> None:
        """Capture decode steps of up to `max_batch_size` sequences, by `how` or in CUDA graphs. Where that cannot be,
        warn with the reason; steps are then launched kernel by kernel."""
        written = [store.written for store in self.cache.stores]
        try:
            self.graphs = self.captured(max_batch_size, max_context, sizes(max_batch_size), how)
        except NotCapturable as reason:
            warnings.warn(f"decode steps run without CUDA graphs, which is slower: {reason}", stacklevel=2)
        for store, before in zip(self.cache.stores, written, strict=True):
            store.written = before

    def record(self, max_batch_size: int, max_context: int) -> None:
        """Have decode steps on a CPU recorded as they come, where attention is the native kernels'."""
        if self.model.alone and backend_of(self.cache.layout).recordable:
            buffers = self._buffers(min(max_batch_size, MOST), min(max_context, LONGEST))
            self.graphs = DecodeTapes(self.model, self._forward, buffers)

    def captured(
        self, max_batch_size: int, max_context: int, rows: Iterable[int], how: Capture | None = None
    ) -> DecodeGraphs:
        """Decode steps of so many rows, captured; raises NotCapturable."""
        if how is None:
            self._check_capturable()
        buffers = self._buffers(max_batch_size, max_context)
        return DecodeGraphs(self._forward, buffers, how or cuda_capture(self.model.device), rows)

    def _buffers(self, rows: int, max_context: int) -> StepBuffers:
        device, size = self.model.device, self.cache.layout.block_size
        width = -(-max_context // size)
        if self.cache.reaches[0] is None:  # no table is longer than the cache, whatever the model's context
            width = min(width, self.cache.num_blocks)
        edges, states = self.cache.span > 0, self.cache.states is not None
        return StepBuffers(rows, width, size, device, edges, len(self.cache.blocks), states)

    def _check_capturable(self) -> None:
        if not self.model.alone:
            raise NotCapturable("the model is divided among several processes")
        devices = {shape.device for shape in self.model.shapes} | {self.model.device}
        if len(devices) > 1:
            raise NotCapturable(f"the model is spread over {', '.join(sorted(map(str, devices)))}")
        if not backend_of(self.cache.layout).capturable:
            raise NotCapturable("attention runs on plain torch, which looks at lengths on the host")

    def _forward(self, batch: Batch) -> Tensor:
        return self.model.step(self.cache, batch)
