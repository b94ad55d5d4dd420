"""The engine: one loop over `step`, tokens in and tokens out. It knows nothing of text.

One thread at a time may touch it; an LLM's threads take turns (threads.py). A step that does not end, because its
forward was interrupted, is computed again by the next, with the same tokens; so is what was launched after it.

A GPU works on its own once a step is launched. With `overlap` the engine launches the next step before it waits for the
tokens of this one, where it is certain who runs in it: the new tokens go from one step to the next on the device. While
the GPU computes that step, the host takes in the tokens of this one, and whoever called `step` turns them into text.
A sequence that its token ends (or its reader) is then one step too far: what it draws there is dropped, what it writes
there stands behind all its tokens, where nobody looks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from octavo.cache.blocks import BlockPool
from octavo.cache.edges import EdgePool
from octavo.cache.pool import CachePool
from octavo.cache.store import KVCache
from octavo.devices import device_of
from octavo.engine.runner import Runner
from octavo.engine.sampling import Choice, choose
from octavo.engine.scheduler import CHUNK_TOKENS, Scheduler, Work
from octavo.engine.sequence import FinishReason, Sequence
from octavo.models.bind import BoundModel


@dataclass
class Launched:
    """A step that the device computes, or has computed, and that no sequence shows yet."""

    work: Work
    choice: Choice


class Engine:
    """Continuous batching over a quantized cache. `overlap` is on by default where it gains: where the device is
    asynchronous."""

    def __init__(
        self,
        model: BoundModel,
        cache: KVCache,
        max_batch_size: int = 16,
        max_batch_tokens: int = CHUNK_TOKENS,
        max_context: int | None = None,
        prefix_caching: bool = True,
        overlap: bool | None = None,
    ):
        self.cache = cache
        self.runner = Runner(model, cache)
        size, edges = cache.layout.block_size, None
        if cache.span:
            edges = EdgePool(cache.span, size, cache.raw_pages, max_batch_size, prefix_caching)
        groups = [BlockPool(blocks, size, prefix_caching, reach)
                  for blocks, reach in zip(cache.blocks, cache.reaches, strict=True)]  # fmt: skip
        self.pool = CachePool(groups, edges, cache.states)
        context = min(model.max_context, max_context or model.max_context)
        self.scheduler = Scheduler(self.pool, max_batch_size, max_batch_tokens, context)
        device = device_of(model.device)
        asynchronous = device.asynchronous and model.alone
        self.overlap = asynchronous if overlap is None else overlap
        self.launched: Launched | None = None
        self.interrupted = False  # whether the last step has not ended, and what it read may be gone
        if device.asynchronous:
            self.runner.capture(max_batch_size, self.scheduler.max_context)
        else:
            device.keep()
            self.runner.record(max_batch_size, self.scheduler.max_context)

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
        with self._whole():
            if self.interrupted:
                self.scheduler.restart()
                self.interrupted = False
            step = self.launched or self._launch(self.scheduler.schedule())  # [(sequence, n_new)]
            following = self.scheduler.following(step.work) if self.overlap else None
            self.launched = self._launch(following, step.choice.tokens) if following else None
            return self.scheduler.commit(step.work, step.choice.read())  # waits for the device

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around a step. One that does not end is computed again, and writes the same rows; what was launched after it
        is dropped, or its tokens would be missing. But states have gone on, and a ring may hold the next span: where
        there are any, what still runs when the next step begins is computed again, as if it had been preempted."""
        try:
            yield
        except BaseException:
            self.launched = None
            self.interrupted = self.cache.states is not None or self.cache.span > 0
            raise

    def _launch(self, work: Work, newest: Tensor | None = None) -> Launched:
        """Queue a step on the device. With `newest`, the tokens of the step before, it follows one not committed."""
        logits = self.runner.run(self.cache.batch(work, newest))
        self.scheduler.launched(work, ahead=newest is not None)
        if newest is not None:
            return Launched(work, choose(logits, [sequence for sequence, _ in work], ahead=True))
        return Launched(work, choose(logits, [sequence for sequence, n_new in work if n_new == sequence.pending]))
