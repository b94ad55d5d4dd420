"""`/v1/models`: what is served, by each of its names."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from octavo.serve.service import Service


def routes(service: Service) -> list[Route]:
    def described(name: str) -> dict[str, Any]:
        context = service.llm.session_len  # under the names that vLLM and OpenRouter have for it
        model = {"id": name, "object": "model", "created": service.created, "owned_by": "octavo"}
        return {**model, "max_model_len": context, "context_length": context}

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in service.names]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        service.check_model(name)
        return JSONResponse(described(name))

    return [Route("/v1/models", models), Route("/v1/models/{name:path}", model)]
