"""The routes. Every refusal, whoever makes it, has OpenAI's form."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.serve import page
from octavo.serve.answering import Answering
from octavo.serve.errors import ApiError
from octavo.serve.metrics import cache_state
from octavo.serve.openapi import document
from octavo.serve.replies import ChatReply, TextReply
from octavo.serve.requests import ChatRequest, CompletionRequest, parse
from octavo.serve.service import Service

KNOWN = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/cache", "/openapi.json")
GUARDED = ("/v1/", "/metrics", "/cache")  # need the key; the page that asks for it does not
R = TypeVar("R", ChatRequest, CompletionRequest)
LEFT = 499  # the status under which nginx counts a client that left


def create_app(service: Service, api_key: str | Sequence[str] = (), cors_origins: tuple[str, ...] = ()) -> Starlette:
    """The ASGI application; it starts the service's worker and stops it. With several keys each is a client."""
    keys = (api_key,) if isinstance(api_key, str) else tuple(api_key)

    def asked(kind: type[R], answer: Callable[[Service, str, R], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            client, body = request.scope["octavo.client"], await _body(request, service)

            def read() -> Response:
                return answer(service, client, parse(body, kind, service.longest, service.ignore_unknown))

            return await service.read(client, len(body), read)

        return endpoint

    async def models(request: Request) -> Response:
        if (name := request.path_params.get("name")) is not None:
            service.check_model(name)
        model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "octavo"}
        return JSONResponse(model if name else {"object": "list", "data": [model]})

    async def health(_: Request) -> Response:
        alive = service.worker.alive
        state = {"status": "ok" if alive else "failed", "failed_steps": service.worker.counts.failures}
        return JSONResponse(state, 200 if alive else 503)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(service.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def cache(_: Request) -> Response:
        return JSONResponse(
            await service.worker.call(lambda llm: cache_state(llm, service.worker, service.name, service.sessions))
        )

    async def openapi(_: Request) -> Response:
        return JSONResponse(document())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with service.running():
            yield

    routes: list[BaseRoute] = [
        Route("/v1/chat/completions", asked(ChatRequest, _chat), methods=["POST"]),
        Route("/v1/completions", asked(CompletionRequest, _completions), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/cache", cache),
        Route("/openapi.json", openapi),
        *page.routes(),
    ]
    middleware = [Middleware(Gate, service, keys)]
    if cors_origins:
        middleware.insert(
            0, Middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
        )
    refusals = {ApiError: _refuse, HTTPException: _refuse_http, Exception: _fail}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=refusals, lifespan=lifespan)


def _chat(service: Service, client: str, request: ChatRequest) -> Response:
    service.check_model(request.model)
    answers = service.answers(request.asked(), "chatcmpl")
    return Answering(service, client, ChatReply(service.name, answers, bool(request.return_token_ids)))


def _completions(service: Service, client: str, request: CompletionRequest) -> Response:
    service.check_model(request.model)
    answers = service.answers(request.asked(), "cmpl")
    echoes = None
    if request.echo:
        echoes = [one if isinstance(one, str) else service.llm.tokenizer.decode(one) for one in request.prompts]
    return Answering(service, client, TextReply(service.name, answers, bool(request.return_token_ids), echoes))


class Gate:
    """Counts requests, tells clients apart, and asks those under /v1 and the like for a key."""

    def __init__(self, app: ASGIApp, service: Service, keys: tuple[str, ...]):
        self.app, self.service = app, service
        self.keys = [_digest(b"Bearer " + key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = LEFT

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if b"transfer-encoding" in dict(scope["headers"]):
                error = ApiError(411, "the body must be sent with its Content-Length", headers={"Connection": "close"})
                await _refuse(None, error)(scope, receive, counted)
            elif (client := self._client(scope)) is not None:
                scope["octavo.client"] = client
                await self.app(scope, receive, counted)
            else:
                error = ApiError(401, "this server asks for a key: Authorization: Bearer KEY", code="invalid_api_key")
                await _refuse(None, error)(scope, receive, counted)
        except Exception:  # it is answered outside of here
            status = 500
            raise
        finally:
            route = scope["path"] if scope["path"] in KNOWN else "other"
            self.service.metrics.requests.labels(route, status).inc()

    def _client(self, scope: Scope) -> str | None:
        """Who asks: where there are several keys the key's number, else the address. None: it may not."""
        address = (scope.get("client") or ("",))[0]
        if not self.keys or not scope["path"].startswith(GUARDED):
            return _network(address)
        given = _digest(dict(scope["headers"]).get(b"authorization", b""))
        fits = [hmac.compare_digest(given, key) for key in self.keys]  # all of them, whichever fits
        if True not in fits:
            return None
        return _network(address) if len(fits) == 1 else f"key {fits.index(True)}"


def _digest(text: bytes) -> bytes:
    """Of one length for all, so that comparing takes the same time for all."""
    return hashlib.sha256(text).digest()


def _network(address: str) -> str:
    """An address, or of IPv6 the network of 64 bits that one host is given."""
    try:
        return str(ipaddress.IPv6Network((address, 64), strict=False)) if ":" in address else address
    except ValueError:
        return address


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


def _refuse(_: Request | None, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


def _refuse_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, error.detail).body, error.status_code, error.headers)


def _fail(_: Request, __: Exception) -> Response:  # starlette logs it
    return JSONResponse(ApiError(500, "the server failed; its log tells why").body, 500)
