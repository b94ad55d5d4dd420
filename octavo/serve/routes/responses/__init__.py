"""`/v1/responses`: OpenAI's newer form of a chat, in which the server can keep the conversation."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from octavo.serve.accounting import Account
from octavo.serve.errors import ApiError
from octavo.serve.output.sending import GeneratedResponse
from octavo.serve.requests.responses import ResponsesRequest
from octavo.serve.response_store import Store
from octavo.serve.routes.endpoint import answered_by
from octavo.serve.routes.responses.body import ResponsesBody
from octavo.serve.service import Service
from octavo.text import Message

GONE = "there is no response of that id here, or not any more: send its conversation as the input"


def routes(service: Service, store: Store) -> list[Route]:
    async def respond(service: Service, account: Account, request: ResponsesRequest) -> Response:
        name = service.check_model(request.model)
        before: Sequence[Message] = ()
        if (id := request.previous_response_id) is not None:
            if (kept := await store.get(id)) is None:
                raise ApiError(400, GONE, param="previous_response_id", code="previous_response_not_found")
            before = kept.messages
        output = service.output(request.generate_request(before), f"resp_{account.key}")
        return GeneratedResponse(service, account, ResponsesBody(name, output, request, before, store))

    async def kept(request: Request) -> Response:
        id = request.path_params["id"]
        if request.method == "DELETE" and await store.remove(id):
            return JSONResponse({"id": id, "object": "response", "deleted": True})
        if request.method != "DELETE" and (found := await store.get(id)) is not None:
            return JSONResponse(found.document)
        raise ApiError(404, GONE)

    return [
        Route("/v1/responses", answered_by(service, ResponsesRequest, respond), methods=["POST"]),
        Route("/v1/responses/{id}", kept, methods=["GET", "DELETE"]),
    ]
