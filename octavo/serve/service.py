"""One request after the other: admitted or refused, made into tokens, sent through the worker, answered in time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from octavo.completion import Answer, Delta
from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.serve.errors import ApiError
from octavo.serve.metrics import Metrics
from octavo.serve.sessions import SessionDir
from octavo.serve.worker import EngineFailure, Job, Worker

logger = logging.getLogger("octavo")


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    max_queue: int = 256  # answers that wait beyond those that run
    timeout: float = 600.0  # seconds from a request to the end of its answer
    max_body: int = 8 << 20  # bytes of a request


class Service:
    """The model behind the routes."""

    def __init__(
        self,
        llm: LLM,
        name: str,
        limits: Limits,
        on_death: Callable[[], None] = lambda: None,
        sessions: SessionDir | None = None,
        grace: float = 30.0,  # seconds that the last sessions have to be saved
    ):
        self.llm, self.name, self.limits, self.grace = llm, name, limits, grace
        self.created = int(time.time())
        self.worker, self.sessions = Worker(llm, on_death), sessions
        self.metrics = Metrics(llm, self.worker)
        self.capacity = llm.engine.scheduler.max_batch_size + limits.max_queue
        self.admitted = 0  # answers promised and not yet complete
        # Tokenizing and compiling grammars, beside the loop and the engine.
        self.preparing = ThreadPoolExecutor(2, thread_name_prefix="octavo prepare")

    @property
    def defaults(self) -> dict[str, Any]:
        """Sampling parameters where a request sets none: the model's own, or as in OpenAI's API temperature 1."""
        chosen = self.llm.default_params
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        own = {name: getattr(chosen, name) for name in names}
        return own if self.llm.model.generation.get("do_sample") else own | {"temperature": 1.0}

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"there is no model of that name: this server has {self.name}",
                param="model",
                code="model_not_found",
            )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engine's thread, and what is saved beside it."""
        self.worker.start(asyncio.get_running_loop())
        stop = asyncio.Event()
        saving = asyncio.create_task(self.sessions.keep(self.worker, stop)) if self.sessions else None
        yield
        if self.sessions and saving:
            stop.set()
            try:
                await asyncio.wait_for(saving, self.grace if self.worker.alive else 0)
            except TimeoutError:
                logger.warning("the server ended before %d conversations were saved", len(self.sessions.fresh))
        self.worker.stop()

    @asynccontextmanager
    async def job(self, n: int, prepare: Callable[[], list[tuple[list[int], SamplingParams]]]) -> AsyncIterator[Job]:
        """The answers of a request of `n` answers, on their way. Whoever leaves early aborts what is unfinished."""
        job = self._admit(n)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.timeout
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    job.answers = await loop.run_in_executor(self.preparing, self._answers, job, prepare)
                    if self.sessions:
                        for prompt in {tuple(answer.sequence.tokens) for answer in job.answers}:
                            await self.sessions.restore(self.worker, prompt)
            except TimeoutError:
                raise _late() from None
            except OctavoError as error:
                raise ApiError.of(error) from None
            self.worker.submit(job)
            timer = loop.call_at(deadline, self.worker.finish, job, "length")
            try:
                yield job
            finally:
                timer.cancel()
                if not job.complete:
                    self.worker.finish(job, "abort")
        finally:
            job.release()
            if self.sessions:
                for answer in job.answers:
                    if answer.sequence.output:
                        self.sessions.remember(answer.sequence.tokens)

    async def batches(self, job: Job) -> AsyncIterator[list[Delta]]:
        """The job's pieces; raises ApiError for what went wrong."""
        try:
            async for pieces in job.batches():
                for delta in pieces:
                    if delta.completion and delta.completion.finish_reason == "error":
                        raise ApiError(500, "the answer cannot be continued as the request demands")
                    if delta.completion and not any(answer.sequence.output for answer in job.answers):
                        raise _late()
                yield pieces
        except OctavoError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        except EngineFailure:
            raise ApiError(500, "the engine failed in a step of this answer; try again") from None

    def check_count(self, n: int) -> None:
        """Refuse a request of more answers than can ever be admitted, before anything is made for each."""
        if n > self.capacity:
            raise ApiError(400, f"{n} answers are more than this server takes at a time, {self.capacity}", param="n")

    def check_calls(self, schema: Mapping[str, Any]) -> None:
        """Refuse demanded calls whose schema cannot be followed: it is the tools that are at fault."""
        try:
            self.llm.grammars.guide(schema)
        except OctavoError as error:
            raise ApiError(400, str(error), param="tools") from None

    def _admit(self, n: int) -> Job:
        if self.admitted + n > self.capacity:
            raise ApiError(
                429, "too many requests are waiting; try again later", code="queue_full", headers={"Retry-After": "1"}
            )
        self.admitted += n

        def release() -> None:
            self.admitted -= n

        return Job(self.worker, release)

    def _answers(self, job: Job, prepare: Callable[[], list[tuple[list[int], SamplingParams]]]) -> list[Answer]:
        return [self.llm.answer(tokens, params, job, i) for i, (tokens, params) in enumerate(prepare())]


def several(tokens: list[int], params: SamplingParams, n: int) -> list[tuple[list[int], SamplingParams]]:
    """`n` answers to one prompt; a seed gives each its own."""
    if params.seed is None:
        return [(tokens, params)] * n
    return [(tokens, replace(params, seed=(params.seed + i) % (1 << 64))) for i in range(n)]


def _late() -> ApiError:
    return ApiError(504, "the time for this request is over and its answer had not begun", code="timeout")
