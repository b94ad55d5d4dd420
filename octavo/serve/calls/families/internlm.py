"""InternLM 2, 2.5 and 3: `<|action_start|><|plugin|>`, one JSON call with `parameters`, `<|action_end|>`."""

from octavo.serve.calls.syntax import Syntax

SYNTAX = Syntax(
    family="InternLM",
    between='", "parameters": ',
    begin="<|action_start|><|plugin|>",
    end="<|action_end|>",
    opening="\n",
    marks=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
)


def of(template: str) -> Syntax | None:
    return SYNTAX if "<|plugin|>" in template else None
