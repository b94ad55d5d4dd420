"""One request after the other: admitted or refused, made into tokens, sent through the worker, answered in time."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from octavo.completion import Delta, Generation
from octavo.engine.prompt_logprobs import Scored, score
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.serve.errors import ApiError
from octavo.serve.fair_queue import FairQueue
from octavo.serve.limits import MAX_SCORES, SMALL, Limits
from octavo.serve.metrics import Metrics
from octavo.serve.output.choices import Output
from octavo.serve.prompts import Functions, engine_requests, tokens_of
from octavo.serve.requests.body import MAX_KEYS
from octavo.serve.requests.generate import Conversation, GenerateRequest, Prompt
from octavo.serve.sessions import SessionDir
from octavo.serve.worker import EngineFailure, Job, Worker
from octavo.token_bytes import TokenBytes

logger = logging.getLogger("octavo")
T = TypeVar("T")
CLOSE = {"Connection": "close"}
LATE = 1.0  # seconds after the deadline that the engine has to end an answer


class Service:
    """The model behind the routes."""

    def __init__(
        self,
        llm: LLM,
        names: Sequence[str],  # all that the model has in the API; answers bear the first
        limits: Limits,
        on_death: Callable[[], None] = lambda: None,
        sessions: SessionDir | None = None,
        grace: float = 30.0,  # seconds that the last sessions have to be saved
        ignore_unknown: bool = False,  # fields of requests
    ):
        self.llm, self.names, self.limits, self.grace = llm, tuple(names), limits, grace
        self.name, self.ignore_unknown = self.names[0], ignore_unknown
        self.created = int(time.time())
        self.worker, self.sessions = Worker(llm, on_death), sessions
        self.metrics = Metrics(llm, self.worker, self.name, lambda: self.waiting)
        places = llm.engine.scheduler.max_batch_size
        self.capacity = places + limits.max_queue
        self.longest = max(llm.session_len, MAX_KEYS)  # list in a request
        self.longest_token = max(map(len, llm.tokenizer.get_vocab()), default=1)
        self.functions, self.bytes_of = Functions(llm), TokenBytes(llm.tokenizer)
        self.jobs: dict[Job, tuple[str, int]] = {}  # whose client and answers, promised and not yet complete
        # Beside the loop and the engine: large bodies one at a time, then prompts made into tokens and schemas into
        # grammars.
        self.reading, self.read_queue = ThreadPoolExecutor(1, thread_name_prefix="octavo read"), FairQueue(1)
        self.preparing, self.prepare_queue = ThreadPoolExecutor(2, thread_name_prefix="octavo prepare"), FairQueue(2)
        self.score_queue = FairQueue(1)  # each prompt that is scored has a cache of its own, beside the engine's
        self.engine_queue = FairQueue(places)  # so that nobody waits in the engine, where the first come is the first

    @property
    def admitted(self) -> int:
        """Choices that are promised and not yet complete."""
        return sum(n for _, n in self.jobs.values())

    @property
    def waiting(self) -> int:
        """Of those, the ones that the engine has not taken up."""
        return max(0, self.admitted - len(self.llm.engine.scheduler.running))

    def check_model(self, name: str | None) -> str:
        """The name that an answer bears: the one that was asked for, if the model has it."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"there is no model of that name: this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name or self.name

    def output(self, request: GenerateRequest, prefix: str) -> Output:
        """The output of a request, of which nothing has come yet."""
        if (n := request.choices) > self.capacity:  # before anything is made for each
            raise ApiError(400, f"{n} answers are more than this server takes at a time, {self.capacity}", param="n")
        first = request.prompts[0]
        reader = self.functions.reader(first) if isinstance(first, Conversation) else None
        return Output(request, self.bytes_of, prefix, reader)

    def tokens(self, request: GenerateRequest) -> list[int]:
        """The token ids of a request's first prompt."""
        try:
            return tokens_of(self.llm, self.functions, request, request.prompts[0])
        except OctavoError as error:
            raise ApiError.of(error, request.names) from None

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
            logger.info("conversations that are saved: %d", len(self.sessions.chains))
        self.worker.stop()

    async def read(self, client: str, size: int, function: Callable[[], T]) -> T:
        """What `function` makes of a body of `size` bytes: beside the loop if that may take more than a moment."""
        if size <= SMALL:
            return function()
        async with self.read_queue.place(client):
            return await asyncio.get_running_loop().run_in_executor(self.reading, function)

    @asynccontextmanager
    async def job(self, client: str, output: Output) -> AsyncIterator[Job]:
        """The answers to a request, on their way. Whoever leaves early aborts what is unfinished."""
        request = output.request
        job = self._admit(client, request.choices)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.timeout
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    async with self.prepare_queue.place(client):
                        job.generations = await loop.run_in_executor(self.preparing, self._generations, job, request)
                    firsts = job.generations[:: request.n]
                    output.prompts = [generation.sequence.tokens[:] for generation in firsts]
                    if self.sessions:
                        for tokens in {tuple(generation.sequence.tokens) for generation in job.generations}:
                            await self.sessions.restore(self.worker, tokens)
                    if request.prompt_logprobs is not None:
                        _check_scores(output.prompts, request.prompt_logprobs)
                        async with self.score_queue.place(client):
                            for prompt in output.prompts:
                                output.prompt_tokens.append(await self._scored(prompt, request.prompt_logprobs))
            except TimeoutError:
                raise _late() from None
            self._queue(client, job, request.priority)
            timer = loop.call_at(deadline, self._end, job)
            try:
                yield job
            finally:
                timer.cancel()
                if not job.complete:
                    self.worker.finish(job, "abort")
        finally:
            job.release()
            if self.sessions:
                for generation in job.generations:
                    if generation.sequence.output:
                        self.sessions.remember(generation.sequence.tokens)

    async def batches(self, job: Job) -> AsyncIterator[list[Delta]]:
        """The job's deltas; raises ApiError for what went wrong."""
        try:
            async for deltas in job.batches():
                for delta in deltas:
                    if delta.completion and delta.completion.error:
                        raise ApiError(500, delta.completion.error)
                    if delta.completion and not any(generation.sequence.output for generation in job.generations):
                        raise _late()
                yield deltas
        except OctavoError as error:
            raise ApiError.of(error) from None
        except EngineFailure:
            raise ApiError(500, "the engine failed in a step of this answer; try again") from None

    async def _scored(self, prompt: list[int], most: int) -> list[Scored | None]:
        """The log-probabilities of a prompt's tokens; the first has none. Between its parts the engine steps."""
        parts, found = score(self.llm.reading, prompt, most), list[Scored | None]([None])
        while (part := await self.worker.call(lambda _: next(parts, None))) is not None:
            found += part
        return found

    def check_length(self, prompt: Prompt) -> None:
        """Refuse a text that must have more tokens than a session holds, before it is made into tokens."""
        text = prompt.text if isinstance(prompt, Conversation) else prompt if isinstance(prompt, str) else ""
        fewest = len(text) // self.longest_token
        if fewest > self.llm.session_len:
            held = f"a session holds {self.llm.session_len} (--session-len, or the model's own context)"
            message = f"the prompt has {fewest} tokens or more, but {held}"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")

    def _admit(self, client: str, n: int) -> Job:
        """Promise `n` answers. Where that is more than may wait, the client with the most makes room: its newest
        request that has not begun is refused in place of this one, if this client has fewer."""
        own = self._of(client)
        while self.admitted + n > self.capacity:
            most = max({client for client, _ in self.jobs.values()}, key=self._of, default=client)
            waiting = [
                job for job, (of, _) in self.jobs.items() if of == most and not any(t.begun for t in job.tickets)
            ]
            if own + n >= self._of(most) or not waiting:
                raise _full()
            waiting[-1].fail(_full())
        job = Job(self.worker, self._release)
        self.jobs[job] = (client, n)
        return job

    def _of(self, client: str) -> int:
        return sum(n for one, n in self.jobs.values() if one == client)

    def _release(self, job: Job) -> None:
        del self.jobs[job]
        for ticket in job.tickets:
            ticket.leave()

    def _queue(self, client: str, job: Job, priority: int) -> None:
        job.unfinished = len(job.generations)
        for generation in job.generations if not job.error else ():

            def start(generation: Generation = generation) -> None:
                job.begun = job.begun or time.monotonic()
                self.worker.submit(job, generation)

            job.tickets.append(self.engine_queue.ask(client, start, priority))

    def _end(self, job: Job) -> None:
        """The deadline: answers end with what they have, which may be nothing."""
        if job.complete:
            return
        if not any(ticket.begun for ticket in job.tickets):
            job.fail(_late())
            return
        for generation, ticket in zip(job.generations, job.tickets, strict=True):
            if not ticket.begun:
                ticket.leave()
                self.worker.submit(job, generation)
        self.worker.finish(job, "length")
        asyncio.get_running_loop().call_later(LATE, self._give_up, job)

    def _give_up(self, job: Job) -> None:
        """The engine is busy still: the client need not wait for its step. The answers end after it."""
        if not job.complete:
            job.fail(_late())

    def _generations(self, job: Job, request: GenerateRequest) -> list[Generation]:
        names: Mapping[str, str] = request.names
        try:
            for prompt in request.prompts if request.longest_prompt is None else ():
                self.check_length(prompt)
            generations = []
            for i, one in enumerate(engine_requests(self.llm, self.functions, request)):
                names = one.names
                generations.append(self.llm.generation(one.tokens, one.params, job, i, one.marks))
                self.llm.engine.scheduler.expect_room(generations[-1].sequence)
        except OctavoError as error:
            raise ApiError.of(error, names) from None
        return generations


def _check_scores(prompts: Sequence[Sequence[int]], likeliest: int) -> None:
    """Refuse prompts with more log-probabilities than are kept for one request."""
    asked = sum(len(prompt) for prompt in prompts) * (likeliest + 1)
    if asked > MAX_SCORES:
        message = (
            f"prompt_logprobs={likeliest} is {asked} values for these prompts, and {MAX_SCORES} are kept: ask for fewer"
        )
        raise ApiError(400, message, param="prompt_logprobs")


def _full() -> ApiError:
    return ApiError(
        429, "too many requests are waiting; try again later", code="queue_full", headers={"Retry-After": "1"}
    )


def _late() -> ApiError:
    return ApiError(
        504, "the time for this request is over and its answer had not begun", code="timeout", headers=CLOSE
    )
