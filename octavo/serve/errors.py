"""What a request can be answered with when it is not served, in OpenAI's form or Anthropic's."""

from collections.abc import Mapping
from typing import Any, Self

from starlette.responses import JSONResponse
from starlette.types import Scope

from octavo.errors import OctavoError

BAD = "invalid_request_error"
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}  # where they differ
ANTHROPIC = "/v1/messages"  # the routes below it answer in Anthropic's form


class ApiError(Exception):
    """A request that is refused or fails. The message names the thing and the remedy, and never quotes a prompt."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @classmethod
    def of(cls, error: OctavoError, names: Mapping[str, str] | None = None) -> Self:
        """Bad input. `names` are those that the request has for fields of SamplingParams."""
        field = error.field or ""
        return cls(400, str(error), param=(names or {}).get(field, field) or None, code=error.code or "invalid_value")

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, BAD if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        kind = (TYPES | ANTHROPIC_TYPES).get(self.status, BAD if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def refusal(scope: Scope, error: ApiError) -> JSONResponse:
    """The answer that says so, in the form of the API whose route was asked."""
    body = error.anthropic_body if scope["path"].startswith(ANTHROPIC) else error.body
    return JSONResponse(body, error.status, error.headers)
