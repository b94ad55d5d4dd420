"""A request's body, read within bounds.

Reading holds the interpreter's lock, so its cost must be small wherever it runs: nothing is nested deep, no list or
object is larger than any request needs, and the check of a request ends at its first error.
"""

from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, from_json

from octavo.serve.errors import ApiError

MAX_DEPTH = 128  # of lists and objects within each other
MAX_KEYS = 4096  # of one object
MAX_PARTS = 250_000  # lists and objects in a body, and names in all of its objects


def check_json(body: bytes, longest: int) -> Any:
    """The value in a body; raises ApiError 400 for one that is not JSON, is nested too deep, or has a list of more than
    `longest` elements or another part too large for any request."""
    for signs in (b"[{", b":"):  # also within strings: no real prompt has so many
        if sum(body.count(bytes([sign])) for sign in signs) > MAX_PARTS:
            raise ApiError(400, f"the body has more than {MAX_PARTS} of {signs.decode()}")
    try:
        value = from_json(body, cache_strings="none")
    except ValueError as error:
        why = f"is nested more than {MAX_DEPTH} deep" if "recursion" in str(error) else "is not JSON"
        raise ApiError(400, f"the body {why}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    _measure(value, longest)
    return value


def _measure(value: Any, longest: int) -> None:
    """Raise ApiError for a value that is nested too deep, or that has too large a part: it names the field."""
    level: list[tuple[str, Any]] = [("", value)]
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, Any]] = []
        for name, part in level:
            most = longest if isinstance(part, list) else MAX_KEYS
            if len(part) > most:
                kind = "elements" if isinstance(part, list) else "fields"
                message = f"{name or 'the body'} has {len(part)} {kind}, and this server takes at most {most}"
                raise ApiError(400, message, param=name or None)
            inner = enumerate(part) if isinstance(part, list) else part.items()
            below += [(name or str(key)[:64], one) for key, one in inner if isinstance(one, dict | list)]
        level = below
        if not level:
            return
    raise ApiError(400, f"{level[0][0]} is nested more than {MAX_DEPTH} deep", param=level[0][0])


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class FirstError(BaseModel):
    """A model whose check ends at the first wrong element of a list, where pydantic would collect all of them."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema
