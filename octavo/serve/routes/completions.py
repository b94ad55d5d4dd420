"""`/v1/chat/completions` and `/v1/completions`: OpenAI's."""

from __future__ import annotations

from starlette.responses import Response
from starlette.routing import Route

from octavo.serve.account import Account
from octavo.serve.answering import Answering
from octavo.serve.bodies import answered_by
from octavo.serve.replies import ChatReply, TextReply
from octavo.serve.requests import ChatRequest, CompletionRequest
from octavo.serve.service import Service


def routes(service: Service) -> list[Route]:
    return [
        Route("/v1/chat/completions", answered_by(service, ChatRequest, _chat), methods=["POST"]),
        Route("/v1/completions", answered_by(service, CompletionRequest, _completions), methods=["POST"]),
    ]


def _chat(service: Service, account: Account, request: ChatRequest) -> Response:
    name = service.check_model(request.model)
    answers = service.answers(request.asked(), "chatcmpl-")
    return Answering(service, account, ChatReply(name, answers, bool(request.return_token_ids)))


def _completions(service: Service, account: Account, request: CompletionRequest) -> Response:
    name = service.check_model(request.model)
    answers = service.answers(request.asked(), "cmpl-")
    echoes = None
    if request.echo:
        echoes = [one if isinstance(one, str) else service.llm.tokenizer.decode(one) for one in request.prompts]
    return Answering(service, account, TextReply(name, answers, bool(request.return_token_ids), echoes))
