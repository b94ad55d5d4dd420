"""`/v1/messages`: Anthropic's form of a chat."""

from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from octavo.serve.accounting import Account
from octavo.serve.calls import CallDelta
from octavo.serve.errors import ApiError
from octavo.serve.output.bodies import ResponseBody
from octavo.serve.output.choices import Call, ChoiceDelta, Output
from octavo.serve.output.events import event
from octavo.serve.output.sending import GeneratedResponse
from octavo.serve.requests.anthropic import CountRequest, MessagesRequest, input_of
from octavo.serve.requests.generate import GenerateRequest
from octavo.serve.routes.endpoint import answered_by
from octavo.serve.service import Service

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "end_turn"}


def routes(service: Service) -> list[Route]:
    return [
        Route("/v1/messages", answered_by(service, MessagesRequest, _messages), methods=["POST"]),
        Route("/v1/messages/count_tokens", answered_by(service, CountRequest, _count, beside=True), methods=["POST"]),
    ]


def _messages(service: Service, account: Account, request: MessagesRequest) -> Response:
    name = service.check_model(request.model)
    output = service.output(request.generate_request(), "msg_")
    return GeneratedResponse(service, account, MessagesBody(name, output))


def _count(service: Service, _: Account, request: CountRequest) -> Response:
    service.check_model(request.model)
    return JSONResponse({"input_tokens": len(service.tokens(GenerateRequest([request.conversation()], {})))})


class MessagesBody(ResponseBody):
    """A message of blocks: text, and uses of tools."""

    def __init__(self, model: str, output: Output):
        super().__init__(model, output)
        self.block = -1  # the one that is streamed
        self.kind = ""  # of it

    def whole(self) -> dict[str, Any]:
        content = [_block(part) for part in self.output.choices[0].parts]
        return {**self._message(), "content": content, **self._end(), "usage": self._usage()}

    def events(self, delta: ChoiceDelta) -> bytes:
        events = b""
        if delta.first:
            start = {"input_tokens": len(self.output.prompts[0]), "output_tokens": 0}
            message = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": start}
            events += _event("message_start", message=message)
        for part in delta.parts:
            if isinstance(part, str):
                events += self._begin("text", {"type": "text", "text": ""})
                events += self._delta({"type": "text_delta", "text": part})
            else:
                events += self._call(part)
        return events

    def end(self) -> bytes:
        end = self._stop() if self.kind else b""
        return end + _event("message_delta", delta=self._end(), usage=self._usage()) + _event("message_stop")

    def broken(self, error: ApiError) -> bytes:
        return event(error.anthropic_body, "error")

    def _call(self, piece: CallDelta) -> bytes:
        events = b""
        if piece.id is not None:
            begun: dict[str, Any] = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
            events += self._begin(piece.id, begun)
        if piece.arguments:
            events += self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
        return events

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        """The beginning of a block, if it is not the one that is open."""
        if kind == self.kind:
            return b""
        events = self._stop() if self.kind else b""
        self.kind, self.block = kind, self.block + 1
        return events + _event("content_block_start", index=self.block, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self.block, delta=delta)

    def _stop(self) -> bytes:
        return _event("content_block_stop", index=self.block)

    def _message(self) -> dict[str, Any]:
        return {"id": self.output.id, "type": "message", "role": "assistant", "model": self.model}

    def _end(self) -> dict[str, Any]:
        (choice,) = self.output.choices
        stop = choice.completion.stopped_by if choice.completion else None
        reason = "stop_sequence" if stop is not None and choice.reason == "stop" else REASONS[choice.reason or "stop"]
        return {"stop_reason": reason, "stop_sequence": stop if reason == "stop_sequence" else None}

    def _usage(self) -> dict[str, int]:
        usage = self.output.usage
        cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.cached}
        return {"input_tokens": usage.prompt - usage.cached, **cached, "output_tokens": usage.generated}


def _block(part: str | Call) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": input_of(part.arguments)}


def _event(name: str, /, **more: Any) -> bytes:
    return event({"type": name, **more}, name)
