"""`--json`: one JSON document on stdout and nothing else."""

from __future__ import annotations

import json
import math
from typing import Any


def show(document: dict[str, Any]) -> None:
    """Print the document; what is not a number becomes null, since JSON has no NaN."""
    print(json.dumps(_plain(document), indent=1, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
