"""How answers are written: a `Reply` for each route, of which these are OpenAI's two of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.engine.scoring import Scored
from octavo.serve.answers import Answers, Choice, Piece
from octavo.serve.calls import CallPiece
from octavo.serve.errors import ApiError
from octavo.serve.events import dumps, event
from octavo.serve.token_texts import ShownToken, chat_logprobs, text_logprobs

DONE = b"data: [DONE]\n\n"


class Reply:
    """The form of one route: of a stream, `piece` after `piece` and then `end`; else `whole`."""

    def __init__(self, model: str, answers: Answers):
        self.model, self.answers = model, answers

    def piece(self, piece: Piece) -> bytes:
        """Events of a stream, in which a piece is told; none if there is nothing to tell."""
        raise NotImplementedError

    def end(self) -> bytes:
        """The last events of a stream."""
        raise NotImplementedError

    def broken(self, error: ApiError) -> bytes:
        """The last events of a stream that is broken off."""
        return event(error.body)

    def whole(self) -> dict[str, Any]:
        """The answers in one document."""
        raise NotImplementedError

    async def keep(self) -> None:
        """Keep what later requests may ask for: the answers are written, and their end is not sent yet."""


class OpenAIReply(Reply):
    """What chat and completions have in common."""

    object: str
    chunk_object: str

    def __init__(self, model: str, answers: Answers, token_ids: bool = False):
        super().__init__(model, answers)
        self.token_ids = token_ids  # they are told too, as in vLLM
        self._opening = b"data: " + dumps(self._head(self.chunk_object))[:-1] + b","  # of every piece

    def piece(self, piece: Piece) -> bytes:
        if piece.empty and not (self.token_ids and piece.token_ids):
            return b""
        choice = self.choice(piece)
        if self.token_ids:
            choice |= self._ids(piece.token_ids)
        more = {"choices": [choice], **(self._prompt(piece.index) if piece.first else {})}
        if self.answers.asked.usage:
            more["usage"] = self._running_usage() if self.answers.asked.running_usage else None
        return self._opening + dumps(more)[1:] + b"\n\n"

    def end(self) -> bytes:
        if not self.answers.asked.usage:
            return DONE
        return event({**self._head(self.chunk_object), "choices": [], "usage": self._usage()}) + DONE

    def whole(self) -> dict[str, Any]:
        choices = [self.whole_choice(i, one) | self._ids(one.token_ids) for i, one in enumerate(self.answers.choices)]
        return {**self._head(self.object), "choices": choices, "usage": self._usage(), **self._prompt(0)}

    def choice(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.answers.id, "object": kind, "created": self.answers.created, "model": self.model}

    def _ids(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(ids)} if self.token_ids else {}

    def _prompt(self, index: int) -> dict[str, Any]:
        """What is told of the prompt of an answer, where it was asked for."""
        told: dict[str, Any] = {}
        at = index // self.answers.asked.n
        if self.token_ids:
            told["prompt_token_ids"] = self.answers.prompts[at]
        if self.answers.asked.prompt_logprobs is not None:
            told["prompt_logprobs"] = [self._scored(one) for one in self.answers.prompt_tokens[at]]
        return told

    def _scored(self, scored: Scored | None) -> dict[str, Any] | None:
        """The log-probabilities at one place of a prompt, in vLLM's form."""
        if scored is None:
            return None
        ranked = {scored.token: (scored.logprob, scored.rank)}
        ranked |= {token: (logprob, rank) for rank, (token, logprob) in enumerate(scored.top.items(), 1)}
        texts = {token: self.answers.bytes_of(token).decode("utf-8", "replace") for token in ranked}
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": texts[token]}
            for token, (logprob, rank) in ranked.items()
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.answers.usage
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.generated,
            "total_tokens": usage.prompt + usage.generated,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
        }

    def _running_usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self.answers.prompts))
        generated = sum(len(choice.token_ids) for choice in self.answers.choices)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


class ChatReply(OpenAIReply):
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def choice(self, piece: Piece) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant"} if piece.first else {}
        text, calls = piece.text, piece.calls
        if text or not (piece.reason or calls):
            said["content"] = text
        if calls:
            said["tool_calls"] = [_streamed(call) for call in calls]
        return {
            "index": piece.index,
            "delta": said,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.reason,
        }

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text, calls = choice.text, choice.calls if choice.called else []
        message: dict[str, Any] = {"role": "assistant", "content": (text or None) if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        logprobs = self._logprobs(choice.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        if self.answers.asked.sampling.get("logprobs") is None:
            return None
        return {"content": chat_logprobs(self.answers.bytes_of, tokens), "refusal": None}


def _streamed(call: CallPiece) -> dict[str, Any]:
    function = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.number, "function": function}
    return {"index": call.number, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


class TextReply(OpenAIReply):
    """`echoes` are the prompts' texts where the answers begin with them."""

    object, chunk_object = "text_completion", "text_completion"

    def __init__(self, model: str, answers: Answers, token_ids: bool = False, echoes: Sequence[str] | None = None):
        super().__init__(model, answers, token_ids)
        self.echoes = echoes

    def choice(self, piece: Piece) -> dict[str, Any]:
        text = self._echo(piece.index) + piece.text if piece.first else piece.text
        logprobs = self._logprobs(piece.index, piece.tokens, piece.first)
        return {"index": piece.index, "text": text, "logprobs": logprobs, "finish_reason": piece.reason}

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text, logprobs = self._echo(index) + choice.text, self._logprobs(index, choice.tokens, True)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason}

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.answers.asked.n] if self.echoes is not None else ""

    def _logprobs(self, index: int, tokens: Sequence[ShownToken], first: bool) -> dict[str, Any] | None:
        if self.answers.asked.sampling.get("logprobs") is None:
            return None
        prompt: Sequence[Scored | None] = ()
        ids: Sequence[int] = ()
        if first and self.echoes is not None:
            at = index // self.answers.asked.n
            prompt, ids = self.answers.prompt_tokens[at], self.answers.prompts[at]
        return text_logprobs(self.answers.bytes_of, tokens, len(self._echo(index)), list(zip(ids, prompt, strict=True)))
