"""The base of all models of requests."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, JsonValue
from pydantic_core import from_json

from octavo.serve.requests.body import FirstError

Int31 = Annotated[int, Field(ge=0, lt=1 << 31)]
Schema = dict[str, JsonValue]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Strict(FirstError):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def read_json(text: str) -> JsonValue:
    """The value that `text` is; None if it is none."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
