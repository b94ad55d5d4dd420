"""The engine's thread, and a request's way through it.

One thread owns model, cache and engine. Others hand it work through a queue, which it empties between two steps; what
a step brings goes to the event loop in one call, however many requests it is for.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

from octavo.completion import Delta, Generation
from octavo.engine.sequence import FinishReason
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.serve.fair_queue import Ticket

logger = logging.getLogger("octavo")
T = TypeVar("T")
WINDOW = 5.0  # seconds that the rate of tokens is taken over
FAILURES = 3  # steps in a row that may fail before the engine is given up


class Job:
    """The answers of one request. Deltas come in the order they were made; `index` tells whose they are."""

    def __init__(self, worker: Worker, on_release: Callable[[Job], None]):
        self.worker, self.on_release = worker, on_release
        self.generations: list[Generation] = []
        self.tickets: list[Ticket] = []  # of each answer, once it waits for the engine
        self.unfinished = -1  # answers; −1 before they wait for the engine
        self.begun: float | None = None  # when the first got its place in the engine
        self.released = False
        self.deltas: list[Delta] = []  # on the loop's side
        self.error: Exception | None = None
        self.wake = asyncio.Event()

    def append(self, delta: Delta) -> None:
        """An answer's outbox, on the engine's thread."""
        self.worker.outbox.append((self, delta))

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """All that has come since the last batch, until every answer is complete; raises what ended the request."""
        while True:
            if self.error:  # it may have ended before the first batch, or after the last
                raise self.error
            if self.deltas:
                deltas, self.deltas = self.deltas, []
                yield deltas
            elif self.complete:
                return
            else:
                await self.wake.wait()
                self.wake.clear()

    @property
    def complete(self) -> bool:
        return self.unfinished == 0 or self.error is not None

    def release(self) -> None:
        """Make room for another request. It is made as soon as the engine is done with this one, though a slow client
        may still be reading."""
        if not self.released:
            self.released = True
            self.on_release(self)

    def fail(self, error: Exception) -> None:
        """End a request by an error that the engine does not know of."""
        self.error = error
        self.release()
        self.wake.set()


@dataclass
class Counts:
    """Since the start; written by the engine's thread alone."""

    failures: int = 0
    failures_in_a_row: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0  # of the prompts, found in the prefix cache
    generated_tokens: int = 0


class Worker:
    """Runs an LLM's engine on a thread of its own. `on_death` is called on it if the engine has to be given up."""

    def __init__(self, llm: LLM, on_death: Callable[[], None] = lambda: None):
        self.llm, self.on_death = llm, on_death
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.outbox: list[tuple[Job, Delta | Exception]] = []
        self.counts = Counts()
        self.recent: deque[tuple[float, int]] = deque(maxlen=256)  # (when a step ended, tokens it generated)
        self.thread = threading.Thread(target=self._run, name="octavo engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.llm.model.bound.on_failure(self._lost)
        self.thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in; answers that are not complete never will be."""
        self.inbox.put(None)
        self.thread.join()

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    @property
    def tokens_per_second(self) -> float:
        """Generated in the last seconds, by all sessions together."""
        since = time.monotonic() - WINDOW
        recent = [(at, tokens) for at, tokens in list(self.recent) if at > since]
        return sum(tokens for _, tokens in recent[1:]) / (recent[-1][0] - recent[0][0]) if len(recent) > 1 else 0.0

    def submit(self, job: Job, generation: Generation) -> None:
        """Begin an answer: it waits for nothing but the engine's own queue."""
        self.inbox.put(lambda: self._submit(job, generation))

    def finish(self, job: Job, reason: FinishReason) -> None:
        """End what is unfinished of a request: its blocks are free after the step that runs now."""
        self.inbox.put(lambda: self._finish(job, reason))

    async def call(self, function: Callable[[LLM], T]) -> T:
        """What `function` returns, run on the engine's thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.llm))
                except Exception as error:
                    future.set_exception(error)

        self.inbox.put(run)
        return await asyncio.wrap_future(future)

    def _run(self) -> None:
        try:
            while self._take_in():
                self._step()
        except BaseException:  # a panic of a native library too: a server without an engine must not stay
            logger.exception("the engine is given up")
            self.on_death()

    def _take_in(self) -> bool:
        """Do what has been handed in; idle, wait for it. False at the end."""
        while not (self.inbox.empty() and self.llm.engine.busy):
            if (command := self.inbox.get()) is None:
                return False
            command()
        return True

    def _step(self) -> None:
        try:
            tokens = self.llm.step()
            self.counts.failures_in_a_row = 0
            self.counts.generated_tokens += tokens
            self.recent.append((time.monotonic(), tokens))
        except Exception:
            self._fail()
            if self.counts.failures_in_a_row == FAILURES or not self.llm.model.bound.alone:
                raise
        finally:
            self._deliver()

    def _submit(self, job: Job, generation: Generation) -> None:
        try:
            self.llm.submit(generation)
        except OctavoError as error:
            self._end(job, error)
        self._deliver()

    def _finish(self, job: Job, reason: FinishReason) -> None:
        try:
            for generation in job.generations:
                self.llm.finish(generation, reason)
        except Exception:
            logger.exception("an answer cannot be completed")
            self._end(job, EngineFailure())
        self._deliver()

    def _lost(self, error: Exception) -> None:
        """The model can no longer compute: the engine's thread is to end, though it may have nothing to do."""

        def end() -> None:
            self._fail()
            self._deliver()
            raise error

        self.inbox.put(end)

    def _fail(self) -> None:
        """End what was running in a step that failed; the waiting go on."""
        logger.exception("a step of the engine failed: the running answers are ended")
        self.counts.failures += 1
        self.counts.failures_in_a_row += 1
        for job in {generation.outbox for generation in self.llm.begun}:
            assert isinstance(job, Job)
            self._end(job, EngineFailure())

    def _end(self, job: Job, error: Exception) -> None:
        """End a request by an error, which is all that is told of it."""
        self.outbox.append((job, error))
        for generation in job.generations:
            self.llm.drop(generation)

    def _deliver(self) -> None:
        """Hand the loop what there is, in one call."""
        if not self.outbox:
            return
        batch, self.outbox = self.outbox, []
        for _, delta in batch:
            if isinstance(delta, Delta) and delta.completion:
                self.counts.prompt_tokens += delta.completion.prompt_tokens
                self.counts.hit_tokens += delta.completion.cached_tokens
        try:
            self.loop.call_soon_threadsafe(_receive, batch)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return


class EngineFailure(Exception):
    """The step that computed this answer failed."""


def _receive(batch: list[tuple[Job, Delta | Exception]]) -> None:
    for job, delta in batch:
        if isinstance(delta, Delta):
            job.deltas.append(delta)
            if delta.completion:
                job.unfinished -= 1
                job.tickets[delta.index].leave()
        else:
            job.error = delta
        if job.complete:
            job.release()
        job.wake.set()
