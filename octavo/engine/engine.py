"""The engine: one loop over `step`, tokens in and tokens out. It knows nothing of text.

It belongs to one thread. Others hand it sequences through a queue of theirs.
"""

from __future__ import annotations

from octavo.cache.batch import Batch
from octavo.cache.blocks import BlockPool
from octavo.cache.store import KVCache
from octavo.engine.runner import Runner
from octavo.engine.sampling import sample
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import FinishReason, Sequence
from octavo.models.bind import BoundModel


class Engine:
    """Continuous batching over a quantized cache."""

    def __init__(
        self,
        model: BoundModel,
        cache: KVCache,
        max_batch_size: int = 16,
        max_batch_tokens: int = 1024,
        max_context: int | None = None,
        prefix_caching: bool = True,
    ):
        self.cache = cache
        self.runner = Runner(model, cache)
        self.pool = BlockPool(cache.num_blocks, cache.layout.block_size, prefix_caching)
        context = min(model.max_context, max_context or model.max_context)
        self.scheduler = Scheduler(self.pool, max_batch_size, max_batch_tokens, context)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises OctavoError if it can never fit."""
        self.scheduler.add(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason = "abort") -> None:
        """End a sequence now, between two steps; its blocks are free at once."""
        self.scheduler.finish(sequence, reason)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Sequence]:
        """One forward of the model; returns the sequences that gained a token, some of them finished by it."""
        work = self.scheduler.schedule()  # [(sequence, n_new)]
        batch = Batch.build(work, self.pool.block_size)
        logits = self.runner.run(batch)
        sampled = sample(logits, [sequence for sequence, n_new in work if n_new == sequence.pending])
        return self.scheduler.commit(work, sampled)
