"""Reading values in Gemma's form: `{key:value,…}`, with strings between two quotes that are tokens of their own."""

import json
import re
from typing import Any

from octavo.serve.calls.syntax import load

SPACE = re.compile(r"\s*")
KEY = re.compile(r"\s*([^\s:{}\[\],]+)\s*:")
WORD = re.compile(r"[^,{}\[\]]+")
WORDS = {"None": None, "True": True, "False": False}  # as Python writes what a template has no form for


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
        return WORDS.get(said := word[0].strip(), said), word.end()


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
