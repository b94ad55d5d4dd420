"""Results as one JSON document, readable by any parser."""

from typing import Any

from pydantic_core import to_json


def dumps(document: dict[str, Any]) -> str:
    """The document as text; what is not a finite number becomes null, since JSON has no word for it."""
    return to_json(document, indent=1, inf_nan_mode="null").decode()
