"""Grammars in llguidance's own form, of what a request asks for."""

import json
import re
from collections.abc import Mapping
from typing import Any

from octavo.errors import OctavoError, one_line
from octavo.grammars.size import MAX_REPETITIONS, least_size, measure_schema, regex_size

# One way to write a value, that of json.dumps: small models that may put white space between two tokens never stop.
SPELLING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
EMBEDDED = re.compile(r"%json (\{.*\})")
QUANTIFIER = re.compile(r"\{(\d{1,9})(?:,(\d{1,9})?)?\}")
UNKNOWN = 64  # bytes that an end may take by a grammar whose ends are not known


def named(kind: str) -> str:
    """A kind of grammar in words."""
    return "JSON schema" if kind == "json_schema" else kind


def refused(kind: str, reason: str) -> OctavoError:
    return OctavoError(f"the {named(kind)} cannot be served: {reason}", kind)


def source(kind: str, value: Any) -> str:
    """The grammar of answers that match; raises OctavoError for what is beyond a limit."""
    from llguidance import LLMatcher, gbnf_to_lark

    if kind == "json_schema":
        measure_schema(value)
        return LLMatcher.grammar_from_json_schema(_json(value), overrides=SPELLING)
    if kind == "regex":
        if regex_size(value) > MAX_REPETITIONS:
            raise refused(kind, f"it repeats more than {MAX_REPETITIONS} characters")
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(literal(text) for text in value))
    repeated = [number for found in QUANTIFIER.findall(EMBEDDED.sub("", value)) for number in found if number]
    if max(map(int, repeated), default=0) > MAX_REPETITIONS:
        raise refused(kind, f"it repeats something more than {MAX_REPETITIONS} times")
    for schema in _embedded(value):
        measure_schema(schema)
    try:
        lark = gbnf_to_lark.any_to_lark(value)
    except gbnf_to_lark.GbnfToLarkError as error:
        raise refused(kind, one_line(error)) from None
    return LLMatcher.grammar_from_lark(lark)


def growth(kind: str, value: Any) -> int:
    """The bytes, at most, by which one token more makes the shortest end of an answer longer."""
    if kind == "json_schema":
        return least_size(value)
    if kind == "grammar":
        return max((UNKNOWN + least_size(schema) for schema in _embedded(value)), default=UNKNOWN)
    return UNKNOWN


def literal(text: str) -> str:
    """A text as a part of a grammar in Lark's form."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any]) -> str:
    """A schema as a part of a grammar in Lark's form."""
    return f"%json {_json({**schema, 'x-guidance': SPELLING})}"


def _json(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise refused("json_schema", f"it is no JSON: {error}") from None


def _embedded(grammar: str) -> list[Any]:
    found = []
    for text in EMBEDDED.findall(grammar):
        try:
            found.append(json.loads(text))
        except (ValueError, RecursionError):
            continue  # the library says what is wrong
    return found
