"""The bodies of responses: how a route writes the output. These are OpenAI's two of completions."""

from collections.abc import Callable, Sequence
from typing import Any

from octavo.engine.prompt_logprobs import Scored
from octavo.serve.calls import CallDelta
from octavo.serve.errors import ApiError
from octavo.serve.output.choices import Choice, ChoiceDelta, Output
from octavo.serve.output.events import dumps, event
from octavo.serve.output.logprobs import ShownToken, chat_logprobs, text_logprobs
from octavo.serve.requests.messages import plain_call

DONE = b"data: [DONE]\n\n"


class ResponseBody:
    """The form of one route: streamed, `events` of each delta and then `end`; else `whole`."""

    def __init__(self, model: str, output: Output):
        self.model, self.output = model, output

    def events(self, delta: ChoiceDelta) -> bytes:
        """The events of a stream that tell a delta; none if there is nothing to tell."""
        raise NotImplementedError

    def end(self) -> bytes:
        """The last events of a stream."""
        raise NotImplementedError

    def broken(self, error: ApiError) -> bytes:
        """The last events of a stream that is broken off."""
        return event(error.body)

    def whole(self) -> dict[str, Any]:
        """The output in one document."""
        raise NotImplementedError

    async def keep(self) -> None:
        """Keep what later requests may ask for: all is written, and the end is not sent yet."""


class OpenAIBody(ResponseBody):
    """What chat and completions have in common."""

    object: str
    chunk_object: str

    def __init__(self, model: str, output: Output, token_ids: bool = False):
        super().__init__(model, output)
        self.token_ids = token_ids  # they are told too, as in vLLM
        self._opening = b"data: " + dumps(self._head(self.chunk_object))[:-1] + b","  # of every event

    def events(self, delta: ChoiceDelta) -> bytes:
        if delta.empty and not (self.token_ids and delta.token_ids):
            return b""
        choice = self.choice(delta)
        if self.token_ids:
            choice |= self._ids(delta.token_ids)
        more = {"choices": [choice], **(self._prompt(delta.index) if delta.first else {})}
        if self.output.request.usage:
            more["usage"] = self._running_usage() if self.output.request.running_usage else None
        return self._opening + dumps(more)[1:] + b"\n\n"

    def end(self) -> bytes:
        if not self.output.request.usage:
            return DONE
        return event({**self._head(self.chunk_object), "choices": [], "usage": self._usage()}) + DONE

    def whole(self) -> dict[str, Any]:
        choices = [self.whole_choice(i, one) | self._ids(one.token_ids) for i, one in enumerate(self.output.choices)]
        return {**self._head(self.object), "choices": choices, "usage": self._usage(), **self._prompt(0)}

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        raise NotImplementedError

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.output.id, "object": kind, "created": self.output.created, "model": self.model}

    def _ids(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(ids)} if self.token_ids else {}

    def _prompt(self, index: int) -> dict[str, Any]:
        """What is told of the prompt of an answer, where it was asked for."""
        told: dict[str, Any] = {}
        at = index // self.output.request.n
        if self.token_ids:
            told["prompt_token_ids"] = self.output.prompts[at]
        if self.output.request.prompt_logprobs is not None:
            told["prompt_logprobs"] = [self._scored(one) for one in self.output.prompt_tokens[at]]
        return told

    def _scored(self, scored: Scored | None) -> dict[str, Any] | None:
        """The log-probabilities at one place of a prompt, in vLLM's form."""
        if scored is None:
            return None
        ranked = {scored.token: (scored.logprob, scored.rank)}
        ranked |= {token: (logprob, rank) for rank, (token, logprob) in enumerate(scored.top.items(), 1)}
        texts = {token: self.output.bytes_of(token).decode("utf-8", "replace") for token in ranked}
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": texts[token]}
            for token, (logprob, rank) in ranked.items()
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.output.usage
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.generated,
            "total_tokens": usage.prompt + usage.generated,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
        }

    def _running_usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self.output.prompts))
        generated = sum(len(choice.token_ids) for choice in self.output.choices)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


class ChatBody(OpenAIBody):
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant"} if delta.first else {}
        text, calls = delta.text, delta.calls
        if text or not (delta.reason or calls):
            said["content"] = text
        if calls:
            said["tool_calls"] = [_streamed(call) for call in calls]
        return {
            "index": delta.index,
            "delta": said,
            "logprobs": self._logprobs(delta.tokens),
            "finish_reason": delta.reason,
        }

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text, calls = choice.text, choice.calls if choice.called else []
        message: dict[str, Any] = {"role": "assistant", "content": (text or None) if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = [plain_call(call.id, call.name, call.arguments) for call in calls]
        logprobs = self._logprobs(choice.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        if self.output.request.sampling.get("logprobs") is None:
            return None
        return {"content": chat_logprobs(self.output.bytes_of, tokens), "refusal": None}


def _streamed(call: CallDelta) -> dict[str, Any]:
    function = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.number, "function": function}
    return {"index": call.number, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


class TextBody(OpenAIBody):
    """`echo` gives the text of a prompt, by its number, where the answers begin with it."""

    object, chunk_object = "text_completion", "text_completion"

    def __init__(self, model: str, output: Output, token_ids: bool = False, echo: Callable[[int], str] | None = None):
        super().__init__(model, output, token_ids)
        self.echo = echo

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        text = self._echo(delta.index) + delta.text if delta.first else delta.text
        logprobs = self._logprobs(delta.index, delta.tokens, delta.first)
        return {"index": delta.index, "text": text, "logprobs": logprobs, "finish_reason": delta.reason}

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text, logprobs = self._echo(index) + choice.text, self._logprobs(index, choice.tokens, True)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason}

    def _echo(self, index: int) -> str:
        return self.echo(index // self.output.request.n) if self.echo is not None else ""

    def _logprobs(self, index: int, tokens: Sequence[ShownToken], first: bool) -> dict[str, Any] | None:
        if self.output.request.sampling.get("logprobs") is None:
            return None
        prompt: Sequence[Scored | None] = ()
        ids: Sequence[int] = ()
        if first and self.echo is not None:
            at = index // self.output.request.n
            prompt, ids = self.output.prompt_tokens[at], self.output.prompts[at]
        return text_logprobs(self.output.bytes_of, tokens, self._echo(index), list(zip(ids, prompt, strict=True)))
