"""A request's body, read and checked before anything is done for it."""

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from octavo.serve.accounting import LEFT, Account
from octavo.serve.errors import ApiError
from octavo.serve.limits import SMALL
from octavo.serve.requests import parse
from octavo.serve.service import Service

R = TypeVar("R", bound=BaseModel)
Endpoint = Callable[[Request], Awaitable[Response]]


def answered_by(
    service: Service,
    kind: type[R],
    answer: Callable[[Service, Account, R], Response | Awaitable[Response]],
    beside: bool = False,
) -> Endpoint:
    """The endpoint that reads a request of a `kind` and has it answered; always `beside` the loop, if `answer` does
    more than a moment's work itself."""

    async def endpoint(request: Request) -> Response:
        account: Account = request.scope["octavo.account"]
        body = await _body(request, service)
        answered = await service.read(
            account.client,
            SMALL + len(body) if beside else len(body),
            lambda: answer(service, account, parse(body, kind, service.longest, service.ignore_unknown)),
        )
        return await answered if inspect.isawaitable(answered) else answered

    return endpoint


async def _body(request: Request, service: Service) -> bytes:
    """The request's body. It must be called JSON: what is not, any site could make a browser send."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
    limit = service.limits.max_body
    if int(request.headers.get("content-length", 0)) > limit:
        raise ApiError(413, f"the body is larger than {limit} bytes (--max-body)")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
    except ClientDisconnect:
        raise ApiError(LEFT, "the client left before the end of its request") from None
    return bytes(body)
