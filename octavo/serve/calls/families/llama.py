"""Llama 3.1, 3.2 and 3.3: the answer is one JSON call, with `parameters`; `<|python_tag|>` may come before it. Their
own template takes one call in a message; several are separated by `; `."""

from dataclasses import replace

from octavo.serve.calls.syntax import Syntax

SYNTAX = Syntax(
    family="Llama 3",
    between='", "parameters": ',
    begin="<|python_tag|>",
    bare=True,
    separator="; ",
    joint=None,
    marks=("<|python_tag|>",),
)
ONE = replace(SYNTAX, separator=None)


def of(template: str) -> Syntax | None:
    if "<|python_tag|>" not in template and not ("<|start_header_id|>" in template and '"parameters"' in template):
        return None
    return ONE if "only supports single tool-calls" in template else SYNTAX
