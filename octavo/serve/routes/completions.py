"""`/v1/chat/completions` and `/v1/completions`: OpenAI's."""

from functools import cache

from starlette.responses import Response
from starlette.routing import Route

from octavo.serve.accounting import Account
from octavo.serve.output.bodies import ChatBody, TextBody
from octavo.serve.output.sending import GeneratedResponse
from octavo.serve.requests import ChatRequest, CompletionRequest
from octavo.serve.routes.endpoint import answered_by
from octavo.serve.service import Service


def routes(service: Service) -> list[Route]:
    return [
        Route("/v1/chat/completions", answered_by(service, ChatRequest, _chat), methods=["POST"]),
        Route("/v1/completions", answered_by(service, CompletionRequest, _completions), methods=["POST"]),
    ]


def _chat(service: Service, account: Account, request: ChatRequest) -> Response:
    name = service.check_model(request.model)
    output = service.output(request.generate_request(), "chatcmpl-")
    return GeneratedResponse(service, account, ChatBody(name, output, bool(request.return_token_ids)))


def _completions(service: Service, account: Account, request: CompletionRequest) -> Response:
    name = service.check_model(request.model)
    output = service.output(request.generate_request(), "cmpl-")

    @cache
    def echo(number: int) -> str:
        """A prompt's text, or what the model was given of it."""
        prompt = request.prompts[number]
        if isinstance(prompt, str) and request.truncate_prompt_tokens is None:
            return prompt
        given: str = service.llm.tokenizer.decode(output.prompts[number])
        return prompt if isinstance(prompt, str) and prompt in given else given  # it may not have been cut

    body = TextBody(name, output, bool(request.return_token_ids), echo if request.echo else None)
    return GeneratedResponse(service, account, body)
