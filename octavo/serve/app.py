"""The app: all routes together, and what is answered when one fails."""

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
from octavo.serve.access import Gate
from octavo.serve.errors import ApiError, refusal
from octavo.serve.response_store import InMemory, Store
from octavo.serve.routes import completions, messages, models, responses, state, tokens
from octavo.serve.service import Service


def create_app(
    service: Service,
    api_key: str | Sequence[str] = (),
    cors_origins: tuple[str, ...] = (),
    store: Store | None = None,
) -> Starlette:
    """The ASGI application; it starts the service's worker and stops it. With several keys each is a client. `store`
    keeps what /v1/responses has answered, by default in this process."""
    keys = (api_key,) if isinstance(api_key, str) else tuple(api_key)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with service.running():
            yield

    routes: list[Route] = [
        *completions.routes(service),
        *messages.routes(service),
        *responses.routes(service, store or InMemory()),
        *models.routes(service),
        *state.routes(service),
        *tokens.routes(service),
        *page.routes(),
    ]
    known = {route.path for route in routes}
    middleware = [Middleware(Gate, service, keys, known, {route.path for route in page.routes()})]
    if cors_origins:
        middleware.insert(
            0, Middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
        )
    refusals = {ApiError: _refuse, HTTPException: _refuse_http, Exception: _fail}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=refusals, lifespan=lifespan)


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope["octavo.account"].refused = error
    return refusal(request.scope, error)


def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(request.scope, ApiError(error.status_code, error.detail, headers=dict(error.headers or {})))


def _fail(request: Request, _: Exception) -> Response:  # starlette logs it
    return refusal(request.scope, ApiError(500, "the server failed; its log tells why"))
