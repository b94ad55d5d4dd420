"""`/tokenize` and `/detokenize`, in vLLM's form: what a prompt is made into, and back."""

from typing import Self

from pydantic import model_validator
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from octavo.serve.accounting import Account
from octavo.serve.errors import ApiError
from octavo.serve.requests.generate import Conversation, GenerateRequest
from octavo.serve.requests.messages import ChatMessage
from octavo.serve.requests.strict import Int31, Strict
from octavo.serve.requests.tools import Tool
from octavo.serve.routes.endpoint import answered_by
from octavo.serve.service import Service
from octavo.text import token_text


class TokenizeRequest(Strict):
    """`POST /tokenize`: a text, or a conversation by the model's chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None  # of a text; a chat template writes its own
    add_generation_prompt: bool | None = None  # of a conversation
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give it or messages, and not both")
        if self.messages is None and (self.tools is not None or self.add_generation_prompt is not None):
            raise ValueError("messages: tools and add_generation_prompt belong to them")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens: is for prompt; the chat template of messages has its own")
        return self

    def generate_request(self) -> GenerateRequest:
        """The request that has this prompt."""
        if self.messages is None:
            return GenerateRequest([self.prompt or ""], {}, special_tokens=self.add_special_tokens is not False)
        functions = [tool.function.model_dump(exclude_none=True) for tool in self.tools or ()]
        messages = [message.plain() for message in self.messages]
        return GenerateRequest([Conversation(messages, functions, reply=self.add_generation_prompt is not False)], {})


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Int31]


def routes(service: Service) -> list[Route]:
    return [
        Route("/tokenize", answered_by(service, TokenizeRequest, _tokenize, beside=True), methods=["POST"]),
        Route("/detokenize", answered_by(service, DetokenizeRequest, _detokenize, beside=True), methods=["POST"]),
    ]


def _tokenize(service: Service, _: Account, request: TokenizeRequest) -> Response:
    service.check_model(request.model)
    tokens = service.tokens(request.generate_request())
    texts = [token_text(service.llm.tokenizer, token) for token in tokens] if request.return_token_strs else None
    size = {"count": len(tokens), "max_model_len": service.llm.session_len}
    return JSONResponse({**size, "tokens": tokens, "token_strs": texts})


def _detokenize(service: Service, _: Account, request: DetokenizeRequest) -> Response:
    service.check_model(request.model)
    most, size = max(request.tokens, default=0), len(service.llm.tokenizer)
    if most >= size:
        raise ApiError(400, f"token {most} is unknown: this model has {size}", param="tokens")
    return JSONResponse({"prompt": service.llm.tokenizer.decode(request.tokens)})
