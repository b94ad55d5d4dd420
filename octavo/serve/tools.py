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
        self.released = ""

    def push(self, text: str) -> str:
        """Add text; returns what can be shown."""
        self.held += text
        if not self.released and self.held.lstrip()[:1] in ("", "{", "["):
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
        if not self.released and (calls := self._calls(self.held)):
            return "", calls
        return self._release(len(self.held)), []

    def _release(self, end: int) -> str:
        text, self.held = self.held[:end], self.held[end:]
        self.released += text
        return text

    def _calls(self, text: str) -> list[Call]:
        """The calls that `text` is; none if it is anything else."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = [self._call(one) for one in (value if isinstance(value, list) else [value])]
        return [call for call in calls if call] if all(calls) else []

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def call_schema(functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of `functions`."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": function.get("parameters") or {}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
