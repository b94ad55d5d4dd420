"""The Python face: text in, text out.

from octavo import LLM, SamplingParams
llm = LLM("model-dir", kv="int8")
for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=64)):
    print(out.text)
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

from octavo.attention import layout_for
from octavo.cache.size import block_bytes, num_blocks, parse_bytes
from octavo.cache.store import KVCache
from octavo.engine.engine import Engine
from octavo.engine.sampling import Sampled, SamplingParams
from octavo.engine.sequence import FinishReason, Sequence
from octavo.engine.warmup import LargestStep
from octavo.errors import OctavoError
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.quant.format import Granularity, KVFormat
from octavo.text import Message, TextStream, encode_chat

Prompt = str | Rows[int]


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str
    tokens: list[int]  # the one that ended it included
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    sampled: list[Sampled]  # tokens with their log-probabilities, where asked for


@dataclass(frozen=True)
class Delta:
    """A piece of an answer as it grows: new text of prompt `index`; the completion comes with the last piece."""

    index: int
    text: str
    completion: Completion | None = None


class LLM:
    """A model with a quantized KV cache.

    `model` is a directory, a Hub id, the bundled model if None, or a loaded `Model` (several LLMs may share one). `kv`
    names the cache's format, by default the 16-bit type of the model. `int8` needs a calibration: the one beside the
    model, or `calibration`, a file or directory; `granularity` and `headroom` override its defaults. `session_len` is
    the longest session in tokens; the cache has `kv_cache_memory` bytes ("4GiB"), or what `max_batch_size` sessions
    need within the share `cache_max_entry_count` of the free memory; on a GPU it takes that share of what is left once
    the largest step has been tried.
    """

    def __init__(
        self,
        model: str | Path | Model | None = None,
        kv: str | KVFormat | None = None,
        *,
        calibration: str | Path | Calibration | None = None,
        granularity: Granularity | None = None,
        headroom: float | None = None,
        session_len: int | None = None,
        max_batch_size: int = 16,
        max_batch_tokens: int = 1024,
        kv_cache_memory: str | int | None = None,
        cache_max_entry_count: float | None = None,
        prefix_caching: bool = True,
        **loading: Any,
    ):
        sizes = {"session_len": session_len, "max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise OctavoError(f"{name} is {size}; it must be at least 1")
        if isinstance(model, Model):
            if loading:
                raise TypeError(f"{', '.join(loading)}: the model is loaded already")
            self.model = model
        else:
            self.model = Model.load(model, context=session_len, **loading)
        bound = self.model.bound
        self.format = bound.raw_format if kv is None else kv if isinstance(kv, KVFormat) else KVFormat.parse(kv)
        self.calibration = self.model.calibration(calibration, self.format)
        if (granularity, headroom) != (None, None) and self.calibration is None:
            raise OctavoError(f"granularity and headroom choose from a calibration; {self.format} has none here")
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

        formats = [self.format] * len(bound.layers)
        layout = layout_for(bound.shapes)
        session_blocks = -(-self.session_len // layout.block_size)
        memory = parse_bytes(kv_cache_memory) if isinstance(kv_cache_memory, str) else kv_cache_memory

        def cache_of(blocks: int) -> KVCache:
            return KVCache(bound.shapes, formats, blocks, layout, self.calibration, granularity, headroom)

        step = 0
        if bound.device.type == "cuda":
            step = LargestStep(max_batch_size, max_batch_tokens, self.session_len).nbytes(bound, cache_of(1))
        blocks = num_blocks(
            block_bytes(bound.shapes, formats, layout.block_size),
            max_batch_size,
            session_blocks,
            bound.device,
            memory,
            cache_max_entry_count,
            step,
        )
        self.engine = Engine(
            bound, cache_of(blocks), max_batch_size, max_batch_tokens, self.session_len, prefix_caching
        )
        self._answers: dict[Sequence, _Answer] = {}

    @property
    def cache(self) -> KVCache:
        return self.engine.cache

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def default_params(self) -> SamplingParams:
        """What the model's own generation config asks for."""
        asked = self.model.generation
        if not asked.get("do_sample"):
            asked = {name: asked[name] for name in ("repetition_penalty", "max_new_tokens") if name in asked}
        return SamplingParams(
            max_tokens=asked.get("max_new_tokens") or SamplingParams.max_tokens,
            temperature=asked.get("temperature") or (1.0 if asked.get("do_sample") else 0.0),
            top_k=asked.get("top_k") or 0,
            top_p=asked.get("top_p") or 1.0,
            min_p=asked.get("min_p") or 0.0,
            repetition_penalty=asked.get("repetition_penalty") or 1.0,
        )

    @overload
    def generate(
        self, prompts: Prompt | Rows[Prompt], params: SamplingParams | Rows[SamplingParams] | None = None
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompts: Prompt | Rows[Prompt],
        params: SamplingParams | Rows[SamplingParams] | None = None,
        *,
        stream: Literal[True],
    ) -> Iterator[Delta]: ...
    def generate(
        self,
        prompts: Prompt | Rows[Prompt],
        params: SamplingParams | Rows[SamplingParams] | None = None,
        *,
        stream: bool = False,
    ) -> list[Completion] | Iterator[Delta]:
        """Continue prompts, each a string or a list of token ids: completions in their order, or with `stream` pieces
        as they come. `params` is one for all or one for each, the model's own defaults if None."""
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        prompts = cast(list[Prompt], [prompts] if one else prompts)
        each = [params or self.default_params] * len(prompts) if not isinstance(params, Rows) else list(params)
        if len(each) != len(prompts):
            raise OctavoError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        outbox: deque[Delta] = deque()
        answers = [
            _Answer(i, self.sequence(prompt, p), TextStream(self.tokenizer, p.stop), outbox)
            for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))
        ]
        pieces = self._run(answers, outbox)
        if stream:
            return pieces
        return [delta.completion for delta in sorted(pieces, key=lambda d: d.index) if delta.completion]

    @overload
    def chat(self, messages: Rows[Message], params: SamplingParams | None = None) -> Completion: ...
    @overload
    def chat(
        self, messages: Rows[Message], params: SamplingParams | None = None, *, stream: Literal[True]
    ) -> Iterator[Delta]: ...
    def chat(
        self, messages: Rows[Message], params: SamplingParams | None = None, *, stream: bool = False
    ) -> Completion | Iterator[Delta]:
        """Answer a conversation `[{"role": "user", "content": …}, …]` by the model's chat template."""
        prompt = encode_chat(self.tokenizer, messages)
        return self.generate(prompt, params, stream=True) if stream else self.generate(prompt, params)[0]

    def sequence(self, prompt: Prompt, params: SamplingParams) -> Sequence:
        """The engine's form of a request; raises OctavoError for tokens the model does not have."""
        tokens = list(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
        if not all(isinstance(token, int) for token in tokens):
            raise OctavoError("a prompt is a string or a list of token ids")
        strange = [token for token in (*tokens, *params.stop_token_ids) if not 0 <= token < self.model.bound.vocab_size]
        if strange:
            raise OctavoError(f"token {strange[0]} is not in the model's vocabulary of {self.model.bound.vocab_size}")
        eos = frozenset() if params.ignore_eos else self.model.eos_ids
        return Sequence(tokens, params, eos | frozenset(params.stop_token_ids))

    def _run(self, answers: list[_Answer], outbox: deque[Delta]) -> Iterator[Delta]:
        """Step the engine until these answers are complete. Whoever stops listening aborts what is unfinished."""
        try:
            for answer in answers:
                self.engine.add(answer.sequence)
                self._answers[answer.sequence] = answer
            unfinished = len(answers)
            while unfinished:
                while not outbox:  # another iterator's step may have filled it
                    self._step()
                delta = outbox.popleft()
                unfinished -= delta.completion is not None
                yield delta
        finally:
            for answer in answers:
                if self._answers.pop(answer.sequence, None) and not answer.sequence.finished:
                    self.engine.finish(answer.sequence)

    def _step(self) -> None:
        for sequence in self.engine.step():
            answer = self._answers[sequence]
            answer.take()
            if answer.text.stopped:
                self.engine.finish(sequence, "stop")
            if sequence.finished:
                answer.complete()


class _Answer:
    """A sequence and its growing text, whose pieces go to `outbox`."""

    def __init__(self, index: int, sequence: Sequence, text: TextStream, outbox: deque[Delta]):
        self.index, self.sequence, self.text, self.outbox = index, sequence, text, outbox

    def take(self) -> None:
        token = self.sequence.tokens[-1]
        ends = self.sequence.finish_reason == "stop"  # the token that ends an answer is no part of its text
        if not ends and (piece := self.text.push(token)):
            self.outbox.append(Delta(self.index, piece))

    def complete(self) -> None:
        sequence = self.sequence
        rest = self.text.flush()
        assert sequence.finish_reason is not None
        completion = Completion(
            text=self.text.text,
            tokens=sequence.output,
            finish_reason="stop" if self.text.stopped else sequence.finish_reason,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=sequence.prefix_hit,
            sampled=sequence.sampled,
        )
        self.outbox.append(Delta(self.index, rest, completion))
