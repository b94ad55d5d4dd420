"""Answers that are held to calls: a grammar in Lark's form, made of a family's syntax and the functions' parameters.

With `must`, the answer is calls and nothing else. Without, it is free text, and a call is held to its function's schema
from its beginning on (vLLM and others call that a structural tag). Functions that are not `strict` are then held to any
JSON object.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.grammars.sources import literal
from octavo.serve.calls.syntax import Syntax

MOST_CALLS = 32  # in one answer; models that know no end would never stop calling
ANY: dict[str, Any] = {"type": "object"}


def calls_grammar(
    syntax: Syntax, functions: Sequence[Mapping[str, Any]], added: Mapping[str, int], *, must: bool, parallel: bool
) -> str:
    """The grammar. `added` are the tokenizer's own tokens for whole texts, such as `<tool_call>`."""

    def text(*parts: str) -> str:
        return _text("".join(parts), added)

    begin, more = text(syntax.begin), parallel and syntax.joint is not None
    block = "call"
    if parallel and syntax.separator is not None:
        block = f"call ({text(syntax.separator)} call){{0,{MOST_CALLS - 1}}}"
    names = [f"{text(one['name'], syntax.between)} arguments_{i}" for i, one in enumerate(functions)]
    schemas = [_arguments(one, must) for one in functions]
    rules = [
        f"inside: {text(syntax.opening)} {block} {text(syntax.closing, syntax.end)}",
        f"call: {text(syntax.before)} name {syntax.rest} {text(syntax.after)}",
        f"name: {' | '.join(names)}",
        *(line for i, schema in enumerate(schemas) for line in syntax.rules(f"arguments_{i}", schema, text)),
    ]
    if must:
        first = "" if syntax.bare else begin
        joint = text(syntax.joint or "")
        following = f"({joint} {begin} inside){{0,{MOST_CALLS - 1}}}" if more else ""
        ended = f"({joint})?" if more and joint else ""  # what comes between calls promises no other: it may end there
        return "\n".join([f"start: {first} inside {following} {ended}", *rules])
    if syntax.bare:
        start = f"start: inside | {begin} inside | FREE?" if begin else "start: inside | FREE?"
        return "\n".join([start, *rules, r"FREE: /[^{\[ \t\r\n](.|\n)*/"])
    head = f"head: TEXT {begin} | spelled" if syntax.begin in added or syntax.marks else "head: spelled"
    unframed = [] if syntax.head else _unframed(functions)
    one = "head inside | unframed" if unframed else "head inside"
    start = f"start: ({one}){{0,{MOST_CALLS}}} TEXT" if more else f"start: {one} | TEXT"
    spelled = f"spelled[lazy]: /(.|\\n)*{re.escape(syntax.begin).replace('/', '[/]')}/"
    return "\n".join([start, head, *rules, *unframed, spelled, r"TEXT: /(.|\n)*/"])


def _unframed(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Calls that small models write without their frame, or in a fence of code: held from the arguments on."""
    lines = [
        f"unframed: ({' | '.join(f'name_{i} SPACE? arguments_{i}' for i in range(len(functions)))}) UNFRAMED_END FENCE?"
    ]
    for i, one in enumerate(functions):
        name = re.escape(one["name"])
        opening = rf'\s*(```(json)?\s*)?\{{\s*"name":\s*"{name}",\s*"(arguments|parameters)":'
        lines.append(f"name_{i}[lazy]: /{opening}/")
    return [*lines, r"SPACE: /[ \n]+/", r"UNFRAMED_END: /\s*\}/", r"FENCE: /\s*```/"]


def _arguments(function: Mapping[str, Any], must: bool) -> Mapping[str, Any]:
    return (function.get("parameters") or ANY) if must or function.get("strict") else ANY


def _text(text: str, added: Mapping[str, int]) -> str:
    """A text as a part of the grammar: tokens that stand for whole texts are no letters to it."""
    own = sorted((one for one in added if one and one in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, own))})", text) if own else [text]
    return " ".join(f"<[{added[part]}]>" if part in added else literal(part) for part in parts if part)
