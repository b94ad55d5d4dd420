"""The routes. Every refusal, whoever makes it, has OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.serve import page
from octavo.serve.account import Account
from octavo.serve.answering import Answering
from octavo.serve.bodies import answered_by
from octavo.serve.errors import ApiError, refusal
from octavo.serve.gate import Gate
from octavo.serve.protocol import ChatRequest, CompletionRequest, NamedTool
from octavo.serve.replies import ChatReply, TextReply
from octavo.serve.routes import models, state, tokens
from octavo.serve.service import Service, several
from octavo.serve.tools import call_schema
from octavo.text import encode_chat, encode_prompt, token_text


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
    n = request.n or 1
    service.check_count(n)
    tools = (
        [tool.model_dump(exclude_none=True) for tool in request.tools or ()] if request.tool_choice != "none" else []
    )
    functions = [tool["function"] for tool in tools]
    schema = request.answer_schema
    if request.demands_call:
        one = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
        schema = call_schema([function for function in functions if one in (None, function["name"])])
    params = _params(lambda: request.params(service.defaults, schema))

    def prepare() -> list[tuple[list[int], SamplingParams]]:
        messages = [message.plain() for message in request.messages]
        service.check_length("".join(message["content"] for message in messages))
        tokens = encode_chat(service.llm.tokenizer, messages, tools)
        if schema is not None and request.demands_call:
            service.check_calls(schema)
        return several(tokens, params, n)

    reply = ChatReply(
        service.name,
        1,
        n,
        partial(token_text, service.llm.tokenizer),
        logprobs=bool(request.logprobs),
        tools=[function["name"] for function in functions] if functions else None,
    )
    return Answering(service, account, reply, prepare, request.stream, request.wants_usage)


def _completions(service: Service, account: Account, request: CompletionRequest) -> Response:
    service.check_model(request.model)
    n, prompts, tokenizer = request.n or 1, request.prompts, service.llm.tokenizer
    service.check_count(n * len(prompts))
    params = _params(lambda: request.params(service.defaults))

    def prepare() -> list[tuple[list[int], SamplingParams]]:
        for prompt in prompts:
            if isinstance(prompt, str):
                service.check_length(prompt)
        encoded = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        return [one for tokens in encoded for one in several(list(tokens), params, n)]

    echoes = None
    if request.echo:
        texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
        echoes = [text for text in texts for _ in range(n)]
    reply = TextReply(
        service.name,
        len(prompts),
        n,
        partial(token_text, tokenizer),
        logprobs=request.logprobs is not None,
        echoes=echoes,
    )
    return Answering(service, account, reply, prepare, request.stream, request.wants_usage)


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope["octavo.account"].refused = error
    return refusal(request.scope, error)


def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(request.scope, ApiError(error.status_code, error.detail))


def _fail(request: Request, _: Exception) -> Response:  # starlette logs it
    return refusal(request.scope, ApiError(500, "the server failed; its log tells why"))


def _params(make: Callable[[], SamplingParams]) -> SamplingParams:
    try:
        return make()
    except OctavoError as error:
        raise ApiError.of(error) from None
