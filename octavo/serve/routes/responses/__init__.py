"""`/v1/responses`: OpenAI's newer form of a chat, in which the server can keep the conversation."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from octavo.serve.account import Account
from octavo.serve.output.sending import GeneratedResponse
from octavo.serve.requests.responses import ResponsesRequest
from octavo.serve.routes.endpoint import answered_by
from octavo.serve.routes.responses.body import ResponsesBody
from octavo.serve.routes.responses.store import Store
from octavo.serve.service import Service
from octavo.text import Message


def routes(service: Service) -> list[Route]:
    store = Store()

    def respond(service: Service, account: Account, request: ResponsesRequest) -> Response:
        name = service.check_model(request.model)
        before: Sequence[Message] = ()
        if request.previous_response_id is not None:
            before = store.get(request.previous_response_id, "previous_response_id").messages
        output = service.output(request.generate_request(before), "resp_")
        return GeneratedResponse(service, account, ResponsesBody(name, output, request, before, store))

    async def kept(request: Request) -> Response:
        id = request.path_params["id"]
        if request.method == "DELETE":
            store.remove(id)
            return JSONResponse({"id": id, "object": "response", "deleted": True})
        return JSONResponse(store.get(id).document)

    return [
        Route("/v1/responses", answered_by(service, ResponsesRequest, respond), methods=["POST"]),
        Route("/v1/responses/{id}", kept, methods=["GET", "DELETE"]),
    ]
