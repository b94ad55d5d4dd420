"""The routes. Every refusal, whoever makes it, has OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.serve import page
from octavo.serve.account import Account
from octavo.serve.answering import Answering
from octavo.serve.bodies import answered_by
from octavo.serve.errors import ApiError, refusal
from octavo.serve.gate import Gate
from octavo.serve.replies import ChatReply, TextReply
from octavo.serve.requests import ChatRequest, CompletionRequest
from octavo.serve.routes import models, state, tokens
from octavo.serve.service import Service


def create_app(service: Service, api_key: str | Sequence[str] = (), cors_origins: tuple[str, ...] = ()) -> Starlette:
    """The ASGI application; it starts the service's worker and stops it. With several keys each is a client."""
    keys = (api_key,) if isinstance(api_key, str) else tuple(api_key)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with service.running():
            yield

    routes: list[Route] = [
        Route("/v1/chat/completions", answered_by(service, ChatRequest, _chat), methods=["POST"]),
        Route("/v1/completions", answered_by(service, CompletionRequest, _completions), methods=["POST"]),
        *models.routes(service),
        *state.routes(service),
        *tokens.routes(service),
        *page.routes(),
    ]
    known = {route.path for route in routes}
    middleware = [Middleware(Gate, service, keys, known)]
    if cors_origins:
        middleware.insert(
            0, Middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
        )
    refusals = {ApiError: _refuse, HTTPException: _refuse_http, Exception: _fail}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=refusals, lifespan=lifespan)


def _chat(service: Service, account: Account, request: ChatRequest) -> Response:
    service.check_model(request.model)
    answers = service.answers(request.asked(), "chatcmpl")
    return Answering(service, account, ChatReply(service.name, answers, bool(request.return_token_ids)))


def _completions(service: Service, account: Account, request: CompletionRequest) -> Response:
    service.check_model(request.model)
    answers = service.answers(request.asked(), "cmpl")
    echoes = None
    if request.echo:
        echoes = [one if isinstance(one, str) else service.llm.tokenizer.decode(one) for one in request.prompts]
    return Answering(service, account, TextReply(service.name, answers, bool(request.return_token_ids), echoes))


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope["octavo.account"].refused = error
    return refusal(request.scope, error)


def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(request.scope, ApiError(error.status_code, error.detail))


def _fail(request: Request, _: Exception) -> Response:  # starlette logs it
    return refusal(request.scope, ApiError(500, "the server failed; its log tells why"))
