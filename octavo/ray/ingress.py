"""The one address: requests are told apart, given to replicas, and what they answer is passed on.

A replica that dies before the first byte of its answer has said nothing: another one is asked. One that dies later
leaves a broken answer, and its stream ends with one error in the form of its route.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.requests import Request
from starlette.responses import Response

from octavo.ray import merged
from octavo.ray.keys import key_of
from octavo.serve.errors import ANTHROPIC, ApiError, refusal
from octavo.serve.limits import SMALL
from octavo.serve.output.events import event
from octavo.serve.requests.body import check_json

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.types import Message, Receive, Scope, Send

TRIES = 4  # replicas that may die before one of them has answered
LOOK = 10.0  # seconds that a request which only looks waits for a replica
PASSED = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
          "client", "server")  # fmt: skip
LOST = "the replica that computed this answer is gone; send the request again"
NONE = "no replica is ready for this request; try again later"
RESPONSES = "/v1/responses"


class Ingress:
    """`replicas` answer; `timeout` is how long a request may wait for one that takes it, in seconds."""

    def __init__(self, replicas: DeploymentHandle, timeout: float, max_body: int):
        self.replicas, self.timeout, self.max_body = replicas, timeout, max_body

    async def __call__(self, request: Request) -> Response:
        scope = {name: request.scope[name] for name in PASSED if name in request.scope}
        if request.url.path in ("/metrics", "/cache") and request.method == "GET":
            return await self._of_all(scope)
        headers, body = request.headers, b""
        if "transfer-encoding" not in headers and int(headers.get("content-length", 0)) <= self.max_body:
            body = await request.body()  # else the replica refuses it by its headers
        look = request.method in ("GET", "HEAD", "OPTIONS")
        key = "" if look else await self._key(body)
        return Passed(self.replicas, key, scope, body, LOOK if look else self.timeout)

    async def _key(self, body: bytes) -> str:
        try:
            if len(body) <= SMALL:
                return key_of(check_json(body, self.max_body))
            return key_of(await asyncio.to_thread(check_json, body, self.max_body))
        except ApiError:  # a replica says what is wrong
            return ""

    async def _of_all(self, scope: Scope) -> Response:
        try:
            asked = self.replicas.broadcast("document", scope)
            found = await asked.results_async(timeout_s=LOOK, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            found = []
        documents = sorted(one for one in found if not isinstance(one, BaseException))
        if not documents:
            return refusal(scope, ApiError(503, NONE))
        _, status, headers, body = documents[0]
        if status == 200:
            texts = {name: text.decode() for name, _, _, text in documents}
            if scope["path"] == "/metrics":
                body = merged.metrics(texts).encode()
            else:
                body = json.dumps(merged.cache({name: json.loads(text) for name, text in texts.items()})).encode()
        kept = {name.decode(): value.decode() for name, value in headers if name != b"content-length"}
        return Response(body, status, kept)


class Passed(Response):
    """An answer of a replica, passed on message by message."""

    def __init__(self, replicas: DeploymentHandle, key: str, scope: Scope, body: bytes, timeout: float):
        self.replicas, self.key, self.asked, self.body, self.timeout = replicas, key, scope, body, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(TRIES):
            start: Message | None = None
            events = 0  # of the stream, that were passed on
            begun = False
            messages = self.replicas.options(stream=True).answer.remote(self.key, self.asked, self.body)
            try:
                async with asyncio.timeout(self.timeout) as waiting:
                    async for message in messages:
                        waiting.reschedule(None)  # a replica has it, and keeps its own time
                        if start is None:
                            start = message
                            continue
                        if not begun:
                            begun = True
                            await send(start)
                        events += message["body"].count(b"\n\n")
                        await send(message)
                return
            except RayActorError:
                if not begun:
                    continue
                if start is None or not _is_stream(start):
                    raise  # the connection is cut off: nothing else tells that a document is not whole
                end = _broken(self.asked["path"], ApiError(500, LOST, code="replica_lost"), events)
                await send({"type": "http.response.body", "body": end, "more_body": False})
                return
            except (TimeoutError, DeploymentUnavailableError):
                await refusal(scope, ApiError(503, NONE, headers={"Retry-After": "1"}))(scope, receive, send)
                return
            finally:
                messages.cancel()
        await refusal(scope, ApiError(500, LOST, code="replica_lost"))(scope, receive, send)


def _is_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


def _broken(path: str, error: ApiError, events: int) -> bytes:
    """The last event of a stream that is broken off after so many."""
    if path.startswith(ANTHROPIC):
        return event(error.anthropic_body, "error")
    if path.startswith(RESPONSES):
        told: dict[str, Any] = {"code": error.code, "message": error.message, "param": None}
        return event({"type": "error", "sequence_number": events, **told}, "error")
    return event(error.body)
