"""Gemma 4 and FunctionGemma: `call:NAME{key:value,…}` between two special tokens, strings between two others. Gemma 3
and older have no template for tools."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

from octavo.serve.calls.syntax import Syntax, load

SPACE = re.compile(r"\s*")
KEY = re.compile(r"\s*([^\s:{}\[\],]+)\s*:")
WORD = re.compile(r"[^,{}\[\]]+")
HEAD = re.compile(r"\s*call:\s*(?P<name>[\w.-]+)\s*")


def read(text: str, quote: str) -> Any:
    """The object that `{key:value,…}` is; raises ValueError for what is none. JSON is taken too."""
    try:
        return load(text)
    except ValueError:
        value, at = _value(text, 0, quote)
        if _space(text, at) < len(text):
            raise ValueError("more than one value") from None
        return value


def _space(text: str, at: int) -> int:
    """Where the space at a place ends."""
    found = SPACE.match(text, at)
    assert found is not None
    return found.end()


def _value(text: str, at: int, quote: str) -> tuple[Any, int]:
    """The value at a place, and where it ends."""
    at = _space(text, at)
    for mark in (quote, '"'):
        if text.startswith(mark, at):
            end = text.index(mark, at + len(mark))
            return text[at + len(mark) : end], end + len(mark)
    if text.startswith("[", at):
        return _list(text, at + 1, quote)
    if text.startswith("{", at):
        return _object(text, at + 1, quote)
    word = WORD.match(text, at)
    if word is None:
        raise ValueError("no value")
    try:
        return load(word[0].strip()), word.end()
    except json.JSONDecodeError:
        return word[0].strip(), word.end()


def _object(text: str, at: int, quote: str) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while not text.startswith("}", at := _space(text, at)):
        key = KEY.match(text, at)
        if key is None:
            raise ValueError("no key")
        found[key[1].strip('"').removeprefix(quote).removesuffix(quote)], at = _value(text, key.end(), quote)
        at = _comma(text, at, "}")
    return found, at + 1


def _list(text: str, at: int, quote: str) -> tuple[list[Any], int]:
    found: list[Any] = []
    while not text.startswith("]", at := _space(text, at)):
        value, at = _value(text, at, quote)
        found.append(value)
        at = _comma(text, at, "]")
    return found, at + 1


def _comma(text: str, at: int, end: str) -> int:
    at = _space(text, at)
    if not text.startswith((",", end), at):
        raise ValueError(f"no comma, and no {end}")
    return at + text.startswith(",", at)


def _syntax(family: str, begin: str, end: str, quote: str) -> Syntax:
    return Syntax(
        family=family,
        begin=begin,
        end=end,
        before="call:",
        between="",
        after="",
        joint="",
        head=HEAD,
        marks=(begin, end, quote),
        quote=quote,
        read=partial(read, quote=quote),
    )


GEMMA4 = _syntax("Gemma 4", "<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION_GEMMA = _syntax("FunctionGemma", "<start_function_call>", "<end_function_call>", "<escape>")


def of(template: str) -> Syntax | None:
    return next((syntax for syntax in (GEMMA4, FUNCTION_GEMMA) if syntax.begin in template), None)
