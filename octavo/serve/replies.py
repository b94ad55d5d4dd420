"""What is answered: pieces of answers in OpenAI's form, streamed or whole."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from octavo.completion import Completion, Delta
from octavo.engine.sequence import Sampled
from octavo.serve.tools import Call, ToolText
from octavo.text import REPLACEMENT

DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")  # in a call's arguments a model may have written half a surrogate pair


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


class Reply:
    """One request's answer: `n` choices for each prompt, of which `take` gets the pieces and `whole` the sum."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str, prompts: int, n: int, text_of: Callable[[int], str]):
        self.id, self.model, self.created = f"{self.prefix}-{uuid.uuid4().hex}", model, int(time.time())
        self.n, self.text_of = n, text_of
        choices = prompts * n
        self.completions: list[Completion | None] = [None] * choices
        self.sampled: list[list[Sampled]] = [[] for _ in range(choices)]
        self.begun = [False] * choices  # whose first piece is streamed

    def chunk(self, delta: Delta, usage: bool) -> dict[str, Any]:
        """A piece as it is streamed."""
        more = {"usage": None} if usage else {}
        return {**self._head(self.chunk_object), "choices": [self._choice(delta)], **more}

    def usage_chunk(self) -> dict[str, Any]:
        """The last piece of a stream whose request asked for it."""
        return {**self._head(self.chunk_object), "choices": [], "usage": self.usage()}

    def take(self, delta: Delta) -> None:
        self.sampled[delta.index] += delta.sampled
        if delta.completion:
            self.completions[delta.index] = delta.completion

    def whole(self) -> dict[str, Any]:
        """All choices."""
        choices = [self._whole(i, c) for i, c in enumerate(self.completions) if c]
        return {**self._head(self.object), "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens; a prompt counts once, however many answers it has."""
        done = [completion for completion in self.completions if completion]
        prompt = sum(completion.prompt_tokens for completion in done[:: self.n])
        generated = sum(len(completion.token_ids) for completion in done)
        cached = sum(completion.cached_tokens for completion in done[:: self.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _whole(self, index: int, completion: Completion) -> dict[str, Any]:
        raise NotImplementedError


class ChatReply(Reply):
    """`tools` are the names of the functions whose calls are looked for; None: none."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, logprobs: bool = False, tools: Sequence[str] | None = None):
        super().__init__(*args)
        self.logprobs = logprobs
        self.texts = [ToolText(tools) for _ in self.completions] if tools is not None else None

    def _choice(self, delta: Delta) -> dict[str, Any]:
        shown = self.texts[delta.index] if self.texts else None
        text, calls, reason = _parts(shown, delta.text, delta.completion)
        said: dict[str, Any] = {"content": text} if text or not reason else {}
        if not self.begun[delta.index]:
            self.begun[delta.index] = True
            said = {"role": "assistant", **said}
        if calls:
            said["tool_calls"] = [{"index": i, **_call(call)} for i, call in enumerate(calls)]
        logprobs = self._logprobs(delta.sampled) if self.logprobs else None
        return {"index": delta.index, "delta": said, "logprobs": logprobs, "finish_reason": reason}

    def _whole(self, index: int, completion: Completion) -> dict[str, Any]:
        shown = ToolText(self.texts[index].names) if self.texts else None
        text, calls, reason = _parts(shown, completion.text, completion)
        message: dict[str, Any] = {"role": "assistant", "content": (text or None) if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        logprobs = self._logprobs(self.sampled[index]) if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, sampled: Sequence[Sampled]) -> dict[str, Any]:
        def named(token: int, logprob: float | None) -> dict[str, Any]:
            text = self.text_of(token)
            whole = REPLACEMENT not in text  # else a part of a character
            return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

        content = [
            {**named(one.token, one.logprob), "top_logprobs": [named(*other) for other in one.top.items()]}
            for one in sampled
        ]
        return {"content": content, "refusal": None}


def _parts(shown: ToolText | None, text: str, ended: Completion | None) -> tuple[str, list[Call], str | None]:
    """What a piece of an answer shows, and, if it is the last, the calls and the reason of the end."""
    reason: str | None = ended.finish_reason if ended else None
    if shown is None:
        return text, [], reason
    text = shown.push(text)
    if ended is None:
        return text, [], None
    rest, calls = shown.finish()
    return text + rest, calls, "tool_calls" if calls and reason == "stop" else reason


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


class TextReply(Reply):
    """`echoes` are the prompts' texts where the answers begin with them."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, logprobs: bool = False, echoes: Sequence[str] | None = None):
        super().__init__(*args)
        self.logprobs, self.echoes = logprobs, echoes
        self.offsets = [0] * len(self.completions)

    def _choice(self, delta: Delta) -> dict[str, Any]:
        echo = "" if self.begun[delta.index] or self.echoes is None else self.echoes[delta.index]
        self.begun[delta.index] = True
        reason = delta.completion.finish_reason if delta.completion else None
        logprobs = self._logprobs(delta.index, delta.sampled) if self.logprobs else None
        return {"index": delta.index, "text": echo + delta.text, "logprobs": logprobs, "finish_reason": reason}

    def _whole(self, index: int, completion: Completion) -> dict[str, Any]:
        echo = self.echoes[index] if self.echoes is not None else ""
        logprobs = self._logprobs(index, self.sampled[index]) if self.logprobs else None
        return {
            "index": index,
            "text": echo + completion.text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }

    def _logprobs(self, index: int, sampled: Sequence[Sampled]) -> dict[str, Any]:
        texts = [self.text_of(one.token) for one in sampled]
        offsets = []
        for text in texts:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in sampled],
            "top_logprobs": [{self.text_of(t): p for t, p in one.top.items()} for one in sampled],
            "text_offset": offsets,
        }
