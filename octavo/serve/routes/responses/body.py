"""What `/v1/responses` answers: items, one for each text and each call, and the events of their growing."""

import uuid
from collections.abc import Sequence
from typing import Any

from octavo.serve.calls import CallDelta
from octavo.serve.errors import ApiError
from octavo.serve.output.bodies import ResponseBody
from octavo.serve.output.choices import Call, ChoiceDelta, Output
from octavo.serve.output.events import event
from octavo.serve.output.logprobs import ShownToken, chat_logprobs
from octavo.serve.requests.messages import plain_call
from octavo.serve.requests.responses import ResponsesRequest
from octavo.serve.requests.strict import read_json
from octavo.serve.response_store import Kept, Store
from octavo.text import Message

ECHOED = ("instructions", "previous_response_id", "max_output_tokens", "temperature", "top_p", "max_tool_calls", "user")


class ResponsesBody(ResponseBody):
    """One answer. It is kept in `store` once it is complete, with the conversation `before` the request."""

    def __init__(self, model: str, output: Output, request: ResponsesRequest, before: Sequence[Message], store: Store):
        super().__init__(model, output)
        self.request, self.before, self.store = request, before, store
        self.items: list[dict[str, Any]] = []  # as far as they have come
        self.number = 0  # of the next event
        self.kept: Kept | None = None  # once it has ended

    # ---- whole -------------------------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        (choice,) = self.output.choices
        for part in choice.parts or [""]:
            self.items.append(_message(part) if isinstance(part, str) else _call(part))
        self._add_logprobs(choice.tokens)
        return self._ended()

    def _ended(self) -> dict[str, Any]:
        """The response at its end; it is kept."""
        (choice,) = self.output.choices
        cut = choice.reason == "length"
        for item in self.items:
            item["status"] = "completed"
        if cut:
            self.items[-1]["status"] = "incomplete"
        usage = self.output.usage
        response = self._response("incomplete" if cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.generated,
            },
        }
        if self.request.store is not False:
            said: Message = {"role": "assistant", "content": choice.text}
            if choice.calls:
                said["tool_calls"] = [_plain(call) for call in choice.calls]
            self.kept = Kept(response, [*self.before, *self.request.messages(), said])
        return response

    async def keep(self) -> None:
        if self.kept:
            await self.store.add(self.kept)

    def _response(self, status: str) -> dict[str, Any]:
        request = self.request.model_dump(exclude_none=True, by_alias=True)
        return {
            "id": self.output.id,
            "object": "response",
            "created_at": self.output.created,
            "status": status,
            "model": self.model,
            "output": [dict(item) for item in self.items],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            **{name: request.get(name) for name in ECHOED},
            "tools": request.get("tools", []),
            "tool_choice": request.get("tool_choice", "auto"),
            "parallel_tool_calls": self.request.parallel_tool_calls is not False,
            "text": {"format": {"type": "text"}} | request.get("text", {}),
            "reasoning": {"effort": None, "summary": None} | request.get("reasoning", {}),
            "truncation": self.request.truncation or "disabled",
            "store": self.request.store is not False,
            "metadata": self.request.metadata or {},
            "background": False,
            "top_logprobs": self.request.top_logprobs or 0,
            "service_tier": "default",
        }

    # ---- streamed ----------------------------------------------------------------------------------------------------

    def events(self, delta: ChoiceDelta) -> bytes:
        events = b""
        if delta.first:
            events += self._event("response.created", response=self._response("in_progress"))
            events += self._event("response.in_progress", response=self._response("in_progress"))
        logprobs = self._logprobs(delta.tokens)
        for part in delta.parts:
            if isinstance(part, str):
                events += self._text(part, logprobs)
                logprobs = []
            else:
                events += self._call_piece(part)
        return events

    def end(self) -> bytes:
        events = b"" if self.items else self._open(_message(""))
        events += self._close("incomplete" if self.output.choices[0].reason == "length" else "completed")
        response = self._ended()
        return events + self._event(f"response.{response['status']}", response=response)

    def broken(self, error: ApiError) -> bytes:
        failed = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=failed)

    def _text(self, text: str, logprobs: list[Any]) -> bytes:
        opened = b""
        if not self.items or self.items[-1]["type"] != "message":
            opened = self._close() + self._open(_message(""))
        item = self.items[-1]
        item["content"][0]["text"] += text
        item["content"][0]["logprobs"] += logprobs
        at = {"item_id": item["id"], "output_index": len(self.items) - 1, "content_index": 0}
        return opened + self._event("response.output_text.delta", **at, delta=text, logprobs=logprobs)

    def _call_piece(self, piece: CallDelta) -> bytes:
        opened = b""
        if piece.id is not None and piece.name is not None:
            opened = self._close() + self._open(_call(Call(piece.id, piece.name, "")))
        if not piece.arguments:
            return opened
        item = self.items[-1]
        item["arguments"] += piece.arguments
        at = {"item_id": item["id"], "output_index": len(self.items) - 1}
        return opened + self._event("response.function_call_arguments.delta", **at, delta=piece.arguments)

    def _open(self, item: dict[str, Any]) -> bytes:
        """The beginning of an item, which is the last from here on."""
        self.items.append(item)
        at, empty = {"output_index": len(self.items) - 1}, {**item}
        if item["type"] != "message":
            return self._event("response.output_item.added", **at, item=empty)
        events = self._event("response.output_item.added", **at, item={**empty, "content": []})
        part = {**item["content"][0]}
        return events + self._event("response.content_part.added", **at, item_id=item["id"], content_index=0, part=part)

    def _close(self, status: str = "completed") -> bytes:
        """The end of the last item. One that another follows is whole, however the answer ends."""
        if not self.items:
            return b""
        item = self.items[-1]
        item["status"] = status
        at = {"item_id": item["id"], "output_index": len(self.items) - 1}
        if item["type"] == "message":
            part = item["content"][0]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events = self._event("response.output_text.done", **at, content_index=0, **text)
            events += self._event("response.content_part.done", **at, content_index=0, part=part)
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events = self._event("response.function_call_arguments.done", **at, **done)
        return events + self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _event(self, name: str, /, **more: Any) -> bytes:
        number, self.number = self.number, self.number + 1
        return event({"type": name, "sequence_number": number, **more}, name)

    # ---- log-probabilities -------------------------------------------------------------------------------------------

    def _logprobs(self, tokens: Sequence[ShownToken]) -> list[Any]:
        return chat_logprobs(self.output.bytes_of, tokens) if self.request.wants_logprobs else []

    def _add_logprobs(self, tokens: Sequence[ShownToken]) -> None:
        for item in self.items:
            if item["type"] == "message":
                item["content"][0]["logprobs"] = self._logprobs(tokens)
                return


def _message(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    head = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", "role": "assistant"}
    return {**head, "content": content}


def _call(call: Call) -> dict[str, Any]:
    head = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "status": "in_progress"}
    return {**head, "call_id": call.id, "name": call.name, "arguments": call.arguments}


def _plain(call: Call) -> dict[str, Any]:
    arguments = read_json(call.arguments)
    return plain_call(call.id, call.name, arguments if isinstance(arguments, dict) else {})
