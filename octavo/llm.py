"""`LLM`, the Python interface: text in, text out.

from octavo import LLM, SamplingParams
llm = LLM("model-dir", kv="int8")
for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=64)):
    print(out.text)
"""

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Rows
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Unpack, overload

from octavo.artefact import Damaged
from octavo.attention import backend_for
from octavo.cache import session
from octavo.cache.plan import plan_layers
from octavo.cache.session import Identity, SavedSession
from octavo.cache.size import CacheSize, num_blocks, num_snapshots
from octavo.cache.store import KVCache
from octavo.calibrate import calibration_for, choose_scales, warn_outside, warn_uncalibrated
from octavo.completion import Completion, Delta, Generation, Outbox
from octavo.devices import device_of
from octavo.engine.engine import Engine
from octavo.engine.params import SamplingParams
from octavo.engine.reading import Reading
from octavo.engine.scheduler import CHUNK_TOKENS
from octavo.engine.sequence import FinishReason, Sequence
from octavo.engine.threads import EngineTurns
from octavo.engine.values import brief, is_number
from octavo.engine.warmup import LargestStep
from octavo.errors import OctavoError, did_you_mean
from octavo.grammars import Grammars
from octavo.inputs import (
    Prompt,
    is_conversation,
    read_conversations,
    read_messages,
    read_params,
    read_prompt,
    read_prompts,
)
from octavo.interrupts import held
from octavo.models.bound import NO_ROWS
from octavo.models.model import Loading, Model
from octavo.parallel import load
from octavo.quant.calibration import SYNTHETIC, Calibration
from octavo.quant.format import Format, Granularity
from octavo.text import Message, TextStream, encode_chat, encode_prompt
from octavo.units import parse_bytes

Params = SamplingParams | Rows[SamplingParams] | None
T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """A saved session that is in the cache again."""

    tokens: list[int]  # of the whole conversation
    cached_tokens: int  # of them, found by the prompt that begins with them


class LLM:
    """A model with a quantized KV cache.

    `model` is a directory, a Hub id, the bundled model if None, or a loaded `Model` (several LLMs may share one). `kv`
    names the cache's format, by default the 16-bit type of the model; "tuned" is what `octavo tune` has chosen for each
    layer. `int8` needs a calibration: the one beside the model, or `calibration`, a file or directory; `granularity`
    and `headroom` override its defaults. `session_len` is the longest session in tokens; the cache has
    `kv_cache_memory` bytes ("4GiB"), or what `max_batch_size` sessions need within the share `cache_max_entry_count` of
    the free memory; on a GPU it takes that share of what is left once the largest step has been tried. Of a hybrid,
    whose states the prefix cache needs, `snapshot_memory` bytes of it are snapshots: by default two for each session.
    `tensor_parallel_size` divides the model among so many processes, each with a GPU of its own and a cache that large.

    Any thread may call it: what several ask for at a time is computed in one batch. Once a step has failed, every call
    that waits and every later one raises EngineFailed. Ctrl-C ends the calls of the main thread and nothing else.
    """

    def __init__(
        self,
        model: str | Path | Model | None = None,
        kv: str | Format | None = None,
        *,
        calibration: str | Path | Calibration | None = None,
        granularity: Granularity | None = None,
        headroom: float | None = None,
        session_len: int | None = None,
        max_batch_size: int = 16,
        max_batch_tokens: int = CHUNK_TOKENS,
        kv_cache_memory: str | int | None = None,
        cache_max_entry_count: float | None = None,
        prefix_caching: bool = True,
        snapshot_memory: str | int | None = None,
        tensor_parallel_size: int = 1,
        **loading: Unpack[Loading],
    ):
        if strange := sorted(loading.keys() - Loading.__annotations__.keys()):
            known = list(inspect.signature(LLM).parameters)[:-1] + list(Loading.__annotations__)
            hint = did_you_mean(strange[0], known)
            raise TypeError(f"LLM has no argument {strange[0]!r}; {hint}choose {', '.join(known)}")
        longest = 1 if session_len is None else session_len
        sizes = {"session_len": longest, "max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        for name, size in sizes.items():
            if not is_number(size, Integral) or size < 1:
                raise OctavoError(f"{name} is {brief(size)}; it must be a whole number of at least 1")
        if not isinstance(model, Model):
            model = load(model, tensor_parallel_size, context=session_len, **loading)
        elif loading or tensor_parallel_size != 1:
            raise TypeError(f"{', '.join(loading) or 'tensor_parallel_size'}: the model is loaded already")
        self.model = model
        bound = self.model.bound
        self.format = self.model.format(kv, calibration)
        found = calibration_for(self.model, calibration, self.format)
        self.calibration = choose_scales(found, self.format, granularity, headroom)
        if not bound.shapes and self.format != bound.raw_format:
            warnings.warn(f"{self.model.name} {NO_ROWS}", stacklevel=2)
        elif self.calibration is None and self.format.takes_calibration:
            warn_uncalibrated(self.model, self.format)
        if session_len is not None and session_len > bound.max_context:
            raise OctavoError(
                f"session_len is {session_len}, but {self.model.name} has a context of {bound.max_context}"
            )
        self.session_len = session_len or bound.max_context
        if self.calibration is not None and self.session_len > self.calibration.header.positions[1] + 1:
            warnings.warn(
                f"sessions may reach {self.session_len} tokens but the calibration covers positions up to "
                f"{self.calibration.header.positions[1]}: beyond them K may leave its range. Calibrate over the whole "
                "context, or lower --session-len",
                stacklevel=2,
            )

        plans = plan_layers(bound.whole, self.format, self.calibration)
        layout = backend_for(plans).layout
        memory = None if kv_cache_memory is None else parse_bytes(kv_cache_memory)
        in_step = max(max_batch_tokens, max_batch_size)
        formats = [plan.format for plan in plans]
        snapshots = num_snapshots(bound.states, snapshot_memory) if prefix_caching else 0
        cost = CacheSize.of(bound.shapes, formats, layout.block_size, in_step, bound.states, snapshots)

        def cache_of(blocks: int) -> KVCache:
            pools, pages = cost.pools(blocks, max_batch_size), cost.raw_pages(max_batch_size)
            return bound.new_cache(plans, pools, layout, pages, max_batch_size, cost.snapshots_beside(max_batch_size))

        step, device = 0, device_of(bound.device)
        if device.asynchronous:
            step = LargestStep(max_batch_size, max_batch_tokens, self.session_len).nbytes(bound, cache_of(1))
        free = max(0, bound.free_memory() - step)
        blocks = num_blocks(cost, max_batch_size, self.session_len, device, free, memory, cache_max_entry_count)
        cache = cache_of(blocks)
        self.engine = Engine(bound, cache, max_batch_size, max_batch_tokens, self.session_len, prefix_caching)
        self.reading = Reading(bound, self.format, self.calibration)
        self.grammars = Grammars(self.model.tokenizer, bound.vocab_size, self.model.eos_ids)
        self._generations: dict[Sequence, Generation] = {}
        self._looked = False  # whether values outside the format's range have been looked for
        self._turns = EngineTurns(self._step)
        bound.on_failure(self._turns.fail)

    def __reduce__(self) -> NoReturn:
        raise OctavoError(
            "an LLM cannot be pickled or copied: make one in each process with LLM(model, …); within one, several LLMs "
            "can share a Model, and several threads an LLM"
        )

    @property
    def cache(self) -> KVCache:
        return self.engine.cache

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def default_params(self) -> SamplingParams:
        """What the model's own generation config asks for."""
        return SamplingParams.of_model(self.model.generation)

    @overload
    def generate(self, prompts: Prompt | Rows[Prompt], sampling_params: Params = None) -> list[Completion]: ...
    @overload
    def generate(
        self, prompts: Prompt | Rows[Prompt], sampling_params: Params = None, *, stream: Literal[True]
    ) -> Iterator[Delta]: ...
    def generate(
        self, prompts: Prompt | Rows[Prompt], sampling_params: Params = None, *, stream: bool = False
    ) -> list[Completion] | Iterator[Delta]:
        """Continue prompts, each a string, a list of token ids or a dict with `prompt` or `prompt_token_ids`:
        completions in their order, or with `stream` pieces as they come. `sampling_params` is one for all or one for
        each, the model's own defaults if None. An answer that fails has the reason in `Completion.error`; the others
        go on. Raises OctavoError, before any work, for what cannot be served."""
        asked = read_prompts(prompts)
        each = read_params(sampling_params, len(asked), lambda: self.default_params)
        outbox: deque[Delta] = deque()
        generations = [
            self.generation(prompt, p, outbox, i) for i, (prompt, p) in enumerate(zip(asked, each, strict=True))
        ]
        if stream:
            return self._run(generations, outbox)
        return [delta.completion for delta in sorted(self._ran(generations, outbox), key=lambda d: d.index)
                if delta.completion]  # fmt: skip

    @overload
    def chat(self, messages: Rows[Message], sampling_params: Params = None) -> Completion: ...
    @overload
    def chat(self, messages: Rows[Rows[Message]], sampling_params: Params = None) -> list[Completion]: ...
    @overload
    def chat(
        self, messages: Rows[Message] | Rows[Rows[Message]], sampling_params: Params = None, *, stream: Literal[True]
    ) -> Iterator[Delta]: ...
    def chat(
        self, messages: Rows[Message] | Rows[Rows[Message]], sampling_params: Params = None, *, stream: bool = False
    ) -> Completion | list[Completion] | Iterator[Delta]:
        """Answer a conversation `[{"role": "user", "content": …}, …]`, or each of a list of them, by the model's chat
        template. A content is text or a list of parts of text. As `generate` otherwise."""
        conversations, one = read_conversations(messages)
        prompts = [encode_chat(self.tokenizer, conversation) for conversation in conversations]
        if stream:
            return self.generate(prompts, sampling_params, stream=True)
        answers = self.generate(prompts, sampling_params)
        return answers[0] if one else answers

    def save(self, path: str | Path, conversation: Prompt | Rows[Message], about: dict[str, Any] | None = None) -> int:
        """Keep a conversation's quantized K and V in a file: a prompt with its answer, as text or token ids, or
        messages. Returns how many of its tokens the file holds the codes of: whole blocks.

        Codes are copied from the prefix cache; what is not there any more, or has never been, is computed first.
        `about` is kept beside them, anything that JSON has. Raises OctavoError if the file cannot be written.
        """
        tokens, identity, pool = self._conversation(conversation), self.session_identity, self.engine.pool
        if self._cached(tokens) < pool.prefix_blocks(tokens) * pool.block_size:
            self._compute(tokens)
        codes = session.to_rows(self.cache, self.call(lambda: session.copy_prefix(self.cache, pool, tokens)))
        session.save(Path(path), tokens, codes, identity, about)
        return session.rows(codes)

    def restore(self, path: str | Path) -> Restored:
        """Put a saved session into the prefix cache: a prompt that begins with its tokens is not prefilled again.

        Raises OctavoError for a file saved with other weights, another format or another calibration. Codes that are
        incomplete or corrupted are never used but computed again from the tokens, with a warning.
        """
        saved = SavedSession.open(Path(path))
        saved.check(self.session_identity, self.model.bound.vocab_size)
        pool = self.engine.pool
        try:
            copies = session.to_blocks(self.cache, saved.codes(self.cache))
            self.call(lambda: session.paste_prefix(self.cache, pool, saved.tokens, copies))
        except Damaged as damage:
            warnings.warn(f"{damage}; what it held is computed again", stacklevel=2)
            self._compute(saved.tokens)
        return Restored(saved.tokens, self._cached(saved.tokens))

    @cached_property
    def session_identity(self) -> Identity:
        """What the codes in this cache mean; raises OctavoError where none could be recognized again."""
        if not self.engine.pool.prefix_caching:
            raise OctavoError("sessions are kept in the prefix cache, and it is turned off")
        if self.model.fingerprint == SYNTHETIC:
            raise OctavoError("sessions cannot be kept with random weights: nothing tells them from others")
        return Identity.of(self.cache, self.model.fingerprint, self.model.bound.arithmetic)

    def sequence(self, prompt: str | Rows[int], params: SamplingParams) -> Sequence:
        """The engine's form of a request; raises OctavoError for tokens the model does not have."""
        tokens = encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        vocabulary = self.model.bound.vocab_size
        asked: dict[str, Iterable[int]] = {
            "prompt": tokens,
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": params.logit_bias,
        }
        for field, ids in asked.items():
            if strange := [token for token in ids if not 0 <= token < vocabulary]:
                raise OctavoError(
                    f"token {strange[0]} is not in the model's vocabulary of {vocabulary}: ids are from 0 to "
                    f"{vocabulary - 1}, as its own tokenizer has them",
                    field,
                )
        eos = frozenset() if params.ignore_eos else self.model.eos_ids
        kind = params.constraint
        guide = self.grammars.guide(kind, getattr(params, kind)) if kind else None
        return Sequence(tokens, params, eos | frozenset(params.stop_token_ids), guide)

    def generation(
        self,
        prompt: str | Rows[int],
        params: SamplingParams,
        outbox: Outbox,
        index: int = 0,
        marks: Mapping[int, str] | None = None,
    ) -> Generation:
        """A request that is not yet in the engine; its pieces will go to `outbox`. `marks` are special tokens that are
        shown, with their texts. Touches no engine: any thread may call it."""
        sequence = self.sequence(prompt, params)
        return Generation(index, sequence, TextStream(self.tokenizer, params, sequence.tokens, marks), outbox)

    def submit(self, *generations: Generation) -> None:
        """Queue answers for the next steps; raises OctavoError, and queues none, if one of them can never fit."""
        self.call(lambda: self._submit(generations))

    def finish(self, generation: Generation, reason: FinishReason = "abort") -> None:
        """End an answer now, between two steps: its blocks are free, and it is complete with what it has."""
        if self.drop(generation, reason):
            generation.complete()

    def drop(self, generation: Generation, reason: FinishReason = "abort") -> bool:
        """End an answer without completing it; whether there was one to end."""
        return self.call(lambda: self._drop(generation, reason))

    @property
    def begun(self) -> list[Generation]:
        """The answers that wait no longer: they run, or a step that failed has left them half ended."""
        waiting = set(self.engine.scheduler.waiting)
        return [generation for sequence, generation in self._generations.items() if sequence not in waiting]

    def step(self) -> int:
        """One step of the engine; pieces of answers go to their outboxes. Returns the number of tokens gained."""
        return self._turns.own(self._step)

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, run between two steps: nothing else touches engine and cache meanwhile."""
        return self._turns.call(function)

    def _submit(self, generations: Iterable[Generation]) -> None:
        self._turns.check()
        for generation in generations:
            self.engine.scheduler.expect_room(generation.sequence)
        for generation in generations:
            self.engine.add(generation.sequence)
            self._generations[generation.sequence] = generation

    def _drop(self, generation: Generation, reason: FinishReason) -> bool:
        if self._generations.pop(generation.sequence, None) is None:
            return False
        self.engine.finish(generation.sequence, reason)
        return True

    def _step(self) -> int:
        gained = self.engine.step()
        for sequence in gained:
            generation = self._generations[sequence]
            generation.take()
            if generation.text.stopped:
                self.engine.finish(sequence, "stop")
            if sequence.finished:
                generation.complete()
                del self._generations[sequence]
                if not self._looked:  # once, after the first answer
                    self._looked = True
                    warn_outside(self.model, self.cache, self.format)
        return len(gained)

    def _conversation(self, conversation: Prompt | Rows[Message]) -> list[int]:
        """Its token ids."""
        if is_conversation(conversation):
            return encode_chat(self.tokenizer, read_messages(conversation, "conversation"), reply=False)
        return self.sequence(read_prompt(conversation, "conversation"), SamplingParams()).tokens

    def _compute(self, tokens: list[int]) -> None:
        """Have the K and V of `tokens` in the prefix cache."""
        longest = self.engine.scheduler.max_context - 1  # a request is answered with a token at least
        outbox: deque[Delta] = deque()
        self._ran([self.generation(tokens[:longest], SamplingParams(max_tokens=1), outbox)], outbox)

    def _cached(self, tokens: Rows[int]) -> int:
        """How many of the tokens a prompt that begins with them finds in the cache."""
        pool = self.engine.pool
        return self.call(lambda: len(pool.find(tokens)) * pool.block_size)

    def _ran(self, generations: list[Generation], outbox: deque[Delta]) -> list[Delta]:
        """All pieces of these answers, complete."""
        with held(), closing(self._run(generations, outbox)) as pieces:
            return list(pieces)

    def _run(self, generations: list[Generation], outbox: deque[Delta]) -> Generator[Delta]:
        """Step the engine until these answers are complete. Whoever stops listening aborts what is unfinished."""
        unfinished = len(generations)
        try:
            self.submit(*generations)
            while unfinished:
                self._turns.wait(lambda: outbox)
                delta = outbox.popleft()
                unfinished -= delta.completion is not None
                yield delta
        finally:
            if unfinished:
                self._turns.post(lambda: [self._drop(generation, "abort") for generation in generations])
