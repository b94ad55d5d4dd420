"""How the server is: whether it lives, what it counts, how full its cache is, which release it is."""

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from octavo import __version__
from octavo.llm import LLM
from octavo.serve.metrics import cache_state
from octavo.serve.openapi import document
from octavo.serve.service import Service


def routes(service: Service) -> list[Route]:
    async def health(_: Request) -> Response:
        alive = service.worker.alive
        state = {"status": "ok" if alive else "failed", "failed_steps": service.worker.counts.failures}
        return JSONResponse(state, 200 if alive else 503)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(service.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def cache(_: Request) -> Response:
        def read(llm: LLM) -> dict[str, Any]:
            return cache_state(llm, service.worker, service.name, waiting, service.sessions)

        waiting = service.waiting  # the loop's; the rest is the engine's
        return JSONResponse(await service.worker.call(read))

    async def version(_: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def openapi(_: Request) -> Response:
        return JSONResponse(document())

    return [
        Route("/health", health),
        Route("/ping", health, methods=["GET", "POST"]),  # SageMaker's name for it
        Route("/metrics", metrics),
        Route("/cache", cache),
        Route("/version", version),
        Route("/openapi.json", openapi),
    ]
