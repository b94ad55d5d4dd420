"""Hermes 2 and 3, Qwen 2.5 and 3, and those that took it over: `<tool_call>`, one JSON call, `</tool_call>`."""

from octavo.serve.calls.syntax import Syntax

SYNTAX = Syntax(
    family="Hermes",
    begin="<tool_call>",
    end="</tool_call>",
    opening="\n",
    closing="\n",
)


def of(template: str) -> Syntax | None:
    return SYNTAX if "<tool_call>" in template and "arguments" in template and "<arg_key>" not in template else None
