"""From a request's body to its model; what is wrong is named."""

from __future__ import annotations

import json
import logging
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from octavo.serve.errors import ApiError
from octavo.serve.requests.body import check_json
from octavo.serve.requests.sampling import WITHOUT_EFFECT, without_effect

logger = logging.getLogger("octavo")
R = TypeVar("R", bound=BaseModel)
TAGS = ("str", "int", "constrained-str", "NamedTool", "MessageItem", "CallItem", "OutputItem", "ReasoningItem")
CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "value_error": "invalid_value",
}
WORDS = {  # where pydantic's own speak of Python
    "missing": "is missing",
    "none_required": "is not supported here: leave it out",
    "too_short": "is empty",
    "string_too_short": "is empty",
    "union_tag_not_found": "its type is none of those that are taken here",
}
MOST_UNKNOWN = 64  # fields of a request that are left out

told: set[str] = set()  # fields that the log has told of


def parse(body: bytes, kind: type[R], longest: int, ignore_unknown: bool = False) -> R:
    """The request in `body`, none of whose lists has more than `longest` elements; raises ApiError 400 with the name of
    the first field that is wrong. With `ignore_unknown`, fields that are not known are left out."""
    value = check_json(body, longest)
    for name in without_effect(value):
        _tell(name, f"the field {name} has no effect: {WITHOUT_EFFECT[name]}")
    for _ in range(MOST_UNKNOWN if ignore_unknown else 1):
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False, include_input=False)
        unknown = [one["loc"] for one in errors if one["type"] == "extra_forbidden"]
        if not ignore_unknown or not unknown:
            break
        for where in unknown:
            _tell(str(where[-1]), f"the field {where[-1]} is not known here, and ignored")
            _leave_out(value, where)
        body = json.dumps(value).encode()
    raise _refusal(errors)


def _refusal(errors: list[Any]) -> ApiError:
    # Of a union every member complains: the one that came furthest is meant. Its tag is no part of the field's name.
    first = max((one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]), key=lambda one: len(one["loc"]))
    where = ".".join(str(part) for part in first["loc"] if not _is_tag(part))
    code = CODES.get(first["type"], "invalid_type" if first["type"].endswith("_type") else "invalid_value")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where}: there is no such field, or it is not supported", param=where, code=code)
    message = WORDS.get(first["type"], first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error":
        name = message.partition(":")[0]
        where = f"{where}.{name}" if where else name
        message = message.partition(": ")[2]
    return ApiError(400, f"{where}: {message}" if where else message, param=where or None, code=code)


def _is_tag(part: Any) -> bool:
    return part in TAGS or "[" in str(part)


def _leave_out(value: Any, where: tuple[Any, ...]) -> None:
    for part in where[:-1]:
        if not _is_tag(part) or (isinstance(value, dict) and part in value):
            value = value[part]
    value.pop(where[-1], None)


def _tell(name: str, message: str) -> None:
    if name not in told and len(told) < 4 * MOST_UNKNOWN:
        told.add(name)
        logger.warning(message, extra={"kind": name})
