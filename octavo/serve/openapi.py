"""The API's own description, OpenAPI 3.1, made of the models that check the requests."""

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from octavo import __version__
from octavo.serve.requests import ChatRequest, CompletionRequest
from octavo.serve.requests.anthropic import CountRequest, MessagesRequest
from octavo.serve.requests.responses import ResponsesRequest
from octavo.serve.routes.tokens import DetokenizeRequest, TokenizeRequest


class Fault(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: Fault


class AnthropicFault(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: Literal["error"]
    error: AnthropicFault


MODELS = (
    *(ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest),
    *(MessagesRequest, CountRequest, ResponsesRequest, Error, AnthropicError),
)
KEY: list[dict[str, list[str]]] = [{}, {"key": []}]  # only a server with --api-key asks for it
REFUSALS = {
    "400": "The request makes no sense, or asks for what is not supported: `param` names the field.",
    "401": "The key is missing or wrong.",
    "404": "There is nothing of that name.",
    "411": "The body came in chunks, without its Content-Length.",
    "413": "The body is too large.",
    "415": "The body is not called JSON.",
    "429": "Too many requests are waiting; `Retry-After` says when to try again.",
    "500": "The engine failed.",
    "503": "The server was stopped before the answer's end.",
    "504": "The time was over before the answer began.",
}


def document() -> dict[str, Any]:
    _, schemas = models_json_schema(
        [(model, "validation") for model in MODELS], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": __version__, "description": "OpenAI's API on a quantized KV cache."},
        "paths": {
            "/v1/chat/completions": {"post": _post("ChatRequest", "Answer a conversation.")},
            "/v1/completions": {"post": _post("CompletionRequest", "Continue prompts.")},
            "/v1/messages": {
                "post": _post("MessagesRequest", "Answer a conversation, in Anthropic's form.", error="AnthropicError")
            },
            "/v1/messages/count_tokens": {
                "post": _post("CountRequest", "The tokens of a prompt.", streams=False, error="AnthropicError")
            },
            "/v1/responses": {"post": _post("ResponsesRequest", "Answer a conversation that may be kept here.")},
            "/v1/responses/{id}": {
                "get": _by("id", _get("A response that is kept.", "401", "404")),
                "delete": _by("id", _get("It is kept no longer.", "401", "404")),
            },
            "/tokenize": {"post": _post("TokenizeRequest", "What a prompt is made into.", streams=False)},
            "/detokenize": {"post": _post("DetokenizeRequest", "The text of tokens.", streams=False)},
            "/v1/models": {"get": _get("The model, by each of its names, with its context length.", "401")},
            "/v1/models/{model}": {"get": _by("model", _get("The model, if that is its name.", "401", "404"))},
            "/cache": {"get": _get("The KV cache in numbers.", "401")},
            "/health": {"get": _health()},
            "/ping": {"get": _health()},
            "/version": {"get": _get("The release of Octavo.")},
            "/metrics": {"get": _get("For Prometheus.", "401", content="text/plain")},
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "The key of --api-key."}},
        },
    }


EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
"""Of a stream: `data` is a JSON document, or [DONE]."""


def _post(request: str, summary: str, streams: bool = True, error: str = "Error") -> dict[str, Any]:
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{request}"}}}
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        answer["text/event-stream"] = {"schema": EVENT}
    return {
        "summary": summary,
        "security": KEY,
        "requestBody": {"required": True, "content": body},
        "responses": {
            "200": {"description": "The answer, whole or streamed." if streams else summary, "content": answer},
            **_refusals(*REFUSALS, error=error),
        },
    }


def _get(summary: str, *refusals: str, content: str = "application/json") -> dict[str, Any]:
    kind = {"type": "object" if content == "application/json" else "string"}
    answer = {"description": summary, "content": {content: {"schema": kind}}}
    key = {"security": KEY} if "401" in refusals else {}
    return {"summary": summary, **key, "responses": {"200": answer, **_refusals(*refusals)}}


def _health() -> dict[str, Any]:
    described = _get("The engine runs.")
    failed = {**described["responses"]["200"], "description": "It does not."}
    return {**described, "responses": {**described["responses"], "503": failed}}


def _by(name: str, described: dict[str, Any]) -> dict[str, Any]:
    """Of one that the path names."""
    return {**described, "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]}


def _refusals(*statuses: str, error: str = "Error") -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}}
    return {status: {"description": REFUSALS[status], "content": content} for status in statuses}
