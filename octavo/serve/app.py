"""The routes. Every refusal, whoever makes it, has OpenAI's form."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
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

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.serve import page
from octavo.serve.answering import Answering
from octavo.serve.errors import ApiError
from octavo.serve.metrics import cache_state
from octavo.serve.openapi import document
from octavo.serve.protocol import ChatRequest, CompletionRequest, NamedTool, parse
from octavo.serve.replies import ChatReply, TextReply
from octavo.serve.service import Service, several
from octavo.serve.tools import call_schema
from octavo.text import encode_chat, encode_prompt, token_text

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
            return await service.read(
                client, len(body), lambda: answer(service, client, parse(body, kind, service.longest))
            )

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


def _chat(service: Service, client: str, asked: ChatRequest) -> Response:
    service.check_model(asked.model)
    n = asked.n or 1
    service.check_count(n)
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()] if asked.tool_choice != "none" else []
    functions = [tool["function"] for tool in tools]
    schema = asked.answer_schema
    if asked.demands_call:
        one = asked.tool_choice.function.name if isinstance(asked.tool_choice, NamedTool) else None
        schema = call_schema([function for function in functions if one in (None, function["name"])])
    params = _params(lambda: asked.params(service.defaults, schema))

    def prepare() -> list[tuple[list[int], SamplingParams]]:
        messages = [message.plain() for message in asked.messages]
        service.check_length("".join(message["content"] for message in messages))
        tokens = encode_chat(service.llm.tokenizer, messages, tools)
        if schema is not None and asked.demands_call:
            service.check_calls(schema)
        return several(tokens, params, n)

    reply = ChatReply(
        service.name,
        1,
        n,
        partial(token_text, service.llm.tokenizer),
        logprobs=bool(asked.logprobs),
        tools=[function["name"] for function in functions] if functions else None,
    )
    return Answering(service, client, reply, prepare, asked.stream, asked.wants_usage)


def _completions(service: Service, client: str, asked: CompletionRequest) -> Response:
    service.check_model(asked.model)
    n, prompts, tokenizer = asked.n or 1, asked.prompts, service.llm.tokenizer
    service.check_count(n * len(prompts))
    params = _params(lambda: asked.params(service.defaults))

    def prepare() -> list[tuple[list[int], SamplingParams]]:
        for prompt in prompts:
            if isinstance(prompt, str):
                service.check_length(prompt)
        encoded = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        return [one for tokens in encoded for one in several(list(tokens), params, n)]

    echoes = None
    if asked.echo:
        texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
        echoes = [text for text in texts for _ in range(n)]
    reply = TextReply(
        service.name,
        len(prompts),
        n,
        partial(token_text, tokenizer),
        logprobs=asked.logprobs is not None,
        echoes=echoes,
    )
    return Answering(service, client, reply, prepare, asked.stream, asked.wants_usage)


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


def _params(make: Callable[[], SamplingParams]) -> SamplingParams:
    try:
        return make()
    except OctavoError as error:
        raise ApiError.of(error) from None
