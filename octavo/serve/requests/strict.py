"""The base of all models of requests."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import ConfigDict, Field, JsonValue
from pydantic_core import from_json

from octavo.serve.requests.body import FirstError

Int31 = Annotated[int, Field(ge=0, lt=1 << 31)]
Schema = dict[str, JsonValue]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Strict(FirstError):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of its fields that are set."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Caller(Strict):
    """Fields that describe the caller or choose among a provider's services, without effect here (sampling.py)."""

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


def read_json(text: str) -> JsonValue:
    """The value that `text` is; None if it is none."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
