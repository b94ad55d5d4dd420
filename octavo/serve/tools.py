"""Calls of functions in what a model says.

Two forms are read: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, with text around it (Hermes, Qwen), and an
answer that is nothing but JSON, one call or a list of them (Llama 3, Mistral; also what a demanded call is made to be).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

OPEN = "<tool_call>"
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON


class ToolText:
    """The text of a growing answer without the calls in it: what may be one is held back until the answer's end."""

    def __init__(self, names: Collection[str]):
        self.names = names
        self.held = ""
        self.begun = False  # whether any of it was shown

    def push(self, text: str) -> str:
        """Add text; returns what can be shown."""
        self.held += text
        if not self.begun and self.held.lstrip()[:1] in ("", "{", "["):
            return ""
        end = self.held.find(OPEN)
        if end < 0:
            end = len(self.held) - next(n for n in range(len(OPEN), -1, -1) if self.held.endswith(OPEN[:n]))
        return self._release(end)

    def finish(self) -> tuple[str, list[Call]]:
        """What is left to show, and the calls. What looks like a call and is none is text."""
        tagged = [self._calls(found) for found in TAGGED.findall(self.held)]
        if tagged and all(tagged):
            rest = TAGGED.sub("", self.held).strip()
            return rest, [call for calls in tagged for call in calls]
        if not self.begun and (calls := self._calls(self.held)):
            return "", calls
        return self._release(len(self.held)), []

    def _release(self, end: int) -> str:
        text, self.held = self.held[:end], self.held[end:]
        self.begun |= bool(text)
        return text

    def _calls(self, text: str) -> list[Call]:
        """The calls that `text` is; none if it is anything else."""
        try:
            value = json.loads(text)
            calls = [self._call(one) for one in (value if isinstance(value, list) else [value])]
        except (ValueError, RecursionError):  # no JSON, NaN among its numbers
            return []
        return [call for call in calls if call] if all(calls) else []

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def call_schema(functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of `functions`. Each function's parameters stand under `$defs` by its name, with
    their references to parts of themselves changed to where they now are."""
    parameters = {one["name"]: _moved(one.get("parameters") or {"type": "object"}, one["name"]) for one in functions}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in parameters
    ]
    return {"$defs": parameters, "anyOf": calls}


def _moved(schema: Any, name: str) -> Any:
    """A schema, or a part of one, as it is under `#/$defs/name`."""
    if isinstance(schema, list):
        return [_moved(part, name) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part, name) for key, part in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{name}{reference[1:]}"
    return moved
