"""Results as one JSON document, readable by any parser."""

import json
import math
from typing import Any


def dumps(document: dict[str, Any]) -> str:
    """The document as text; what is not a finite number becomes null, since JSON has no word for it."""
    return json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
