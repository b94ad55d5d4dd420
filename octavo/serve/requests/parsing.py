"""From a request's body to its model; what is wrong is named."""

import json
import logging
from functools import reduce
from operator import getitem
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from octavo.serve.errors import ApiError
from octavo.serve.requests.body import check_json
from octavo.serve.requests.sampling import WITHOUT_EFFECT, without_effect

logger = logging.getLogger("octavo")
R = TypeVar("R", bound=BaseModel)
# Of unions, by their names; others have brackets.
MEMBERS = ("str", "int", "constrained-str", "NamedTool", "NamedFlatTool")
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
        unknown = [_path(one) for one in errors if one["type"] == "extra_forbidden"]
        if not ignore_unknown or not unknown:
            break
        for *outer, name in unknown:
            _tell(str(name), f"the field {name} is not known here, and ignored")
            reduce(getitem, outer, value).pop(name, None)
        body = json.dumps(value).encode()
    raise _refusal(errors)


def _refusal(errors: list[Any]) -> ApiError:
    # Of a union every member complains: the one that came furthest is meant, and of those one that fits its type.
    about = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
    first = max(about, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    where = ".".join(map(str, _path(first)))
    code = CODES.get(first["type"], "invalid_type" if first["type"].endswith("_type") else "invalid_value")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where}: there is no such field, or it is not supported", param=where, code=code)
    message = WORDS.get(first["type"], first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error":
        name = message.partition(":")[0]
        where = f"{where}.{name}" if where else name
        message = message.partition(": ")[2]
    return ApiError(400, f"{where}: {message}" if where else message, param=where or None, code=code)


def _path(error: Any) -> list[Any]:
    """The names and numbers that lead to what is wrong. Pydantic puts the member of a union in between, and behind the
    number of an element in a list of a tagged union its tag, which may be the name of a field as well."""
    where = [str(part) for part in error["loc"]]
    found = []
    for i, part in enumerate(where):
        unknown = error["type"] == "extra_forbidden" and i == len(where) - 1  # it may have any name
        tag = i > 1 and where[i - 2].startswith("list[tagged-union[")
        if unknown or not (tag or part in MEMBERS or "[" in part):
            found.append(error["loc"][i])
    return found


def _tell(name: str, message: str) -> None:
    if name not in told and len(told) < 4 * MOST_UNKNOWN:
        told.add(name)
        logger.warning(message, extra={"kind": name})
