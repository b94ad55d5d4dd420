"""Gemma's form of calls is held to a schema as JSON is: what the schema takes is taken, what it does not is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from octavo import OctavoError
from octavo.grammars import Grammars
from octavo.models.model import Model
from octavo.serve.calls import calls_grammar
from octavo.serve.calls.gemma import FUNCTION_GEMMA
from tests.serve.calls.published import TEMPLATES
from tests.serve.calls.test_families import called, takes, tokens_for


def object_of(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


TREE = {"$ref": "#/$defs/tree"}
# Parameters of a function, arguments that they take, and arguments that they do not.
CASES: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    (object_of("a", a={"type": "string"}, B={"type": "integer"}), [{"a": "x"}, {"a": "", "B": 1}], [{}, {"B": 1}]),
    (object_of(a={"type": "null"}, b={"type": "boolean"}), [{}, {"b": True}], [{"a": 1}, {"b": "true"}, {"c": 1}]),
    (object_of("c", a={}, c={"type": "boolean"}, b={"type": "number"}), [{"c": True}, {"a": [{}], "c": False}], [{}]),
    (object_of("n", n={"type": "integer", "minimum": 3, "maximum": 12}), [{"n": 3}, {"n": 12}], [{"n": 2}, {"n": 3.5}]),
    (object_of("n", n={"type": ["number", "null"]}), [{"n": -1.5}], [{"n": "1"}, {"n": True}]),
    (object_of("e", e={"enum": ["a b", 7, {"k": "v"}]}), [{"e": "a b"}, {"e": 7}, {"e": {"k": "v"}}], [{"e": "7"}]),
    (object_of("s", s={"type": "string", "maxLength": 3, "minLength": 2}), [{"s": "é{"}], [{"s": "abcd"}, {"s": "a"}]),
    (object_of("s", s={"type": "string", "pattern": "^[a-c]+$"}), [{"s": "abba"}], [{"s": "d"}, {"s": "a d"}]),
    (object_of("s", s={"type": "string", "pattern": "b/c"}), [{"s": "ab/cd"}], [{"s": "bc"}]),
    (object_of("s", s={"type": "string", "format": "date"}), [{"s": "2026-11-29"}], [{"s": "2026-13-29"}, {"s": ""}]),
    (object_of("l", l={"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2}),
     [{"l": [1]}, {"l": [1, 2]}], [{"l": []}, {"l": [1, 1, 1]}, {"l": [3]}]),
    (object_of("l", l={"type": "array", "prefixItems": [{"const": 1}, {"type": "string"}]}),
     [{"l": [1, "x"]}], [{"l": [1]}]),
    (object_of("v", v={"anyOf": [{"type": "integer"}, object_of("k", k={"type": "string"})]}),
     [{"v": 1}, {"v": {"k": "x"}}], [{"v": "x"}, {"v": {}}]),
    (object_of("v", v={"allOf": [object_of("a", a={"const": 1})]}), [{"v": {"a": 1}}], [{"v": {"a": 2}}, {"v": {}}]),
    ({**object_of("t", t=TREE), "$defs": {"tree": object_of("value", value={"type": "integer"}, next=TREE)}},
     [{"t": {"value": 1, "next": {"value": 2}}}], [{"t": {"next": {"value": 2}}}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"any": 1, "key": 2}], [{"any": "x"}]),
    ({**object_of("a", a={"const": 1}), "additionalProperties": {"type": "string"}},
     [{"a": 1}, {"a": 1, "z": "y"}], [{"z": "y"}, {"a": 1, "z": 2}]),
    ({"type": "object"}, [{}, {"any": {"thing": [1, "x", False, []]}}], []),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "letters"])
def test_what_a_schema_takes_is_what_a_held_call_may_be(pamphlet: Model, tokens: bool):
    tokenizer = copy.deepcopy(pamphlet.tokenizer)
    added = tokens_for(tokenizer, FUNCTION_GEMMA) if tokens else {}
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    for schema, good, bad in CASES:
        function = {"name": "weather", "strict": True, "parameters": schema}
        grammar = calls_grammar(FUNCTION_GEMMA, [function], added, must=True, parallel=True)
        for arguments in (good, bad):
            for one in arguments:
                written = called(tokenizer, TEMPLATES["FunctionGemma"].text, [one])
                assert takes(grammars, grammar, written) is (arguments is good), (schema, written)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "x"}, "there is no type 'x'"),
        ({"$ref": "#/$defs/none"}, "there is no #/[$]defs/none"),
        (object_of("a"), "'a' is required, and no property"),
        (object_of(a={"enum": []}), "no value"),
        (object_of(a={"pattern": "a{9999}", "type": "string"}), "repeat more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_held_to_is_refused(schema: dict[str, Any], why: str):
    function = {"name": "weather", "strict": True, "parameters": schema}
    with pytest.raises(OctavoError, match=why):
        calls_grammar(FUNCTION_GEMMA, [function], {}, must=True, parallel=True)


def test_a_string_that_has_no_end_is_ended_by_its_own_quote(pamphlet: Model):
    tokenizer = copy.deepcopy(pamphlet.tokenizer)
    added = tokens_for(tokenizer, FUNCTION_GEMMA)
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    schema = object_of("s l", s={"type": "string"}, l={"type": "array", "minItems": 1})
    function = {"name": "weather", "strict": True, "parameters": schema}
    guide = grammars.guide("grammar", calls_grammar(FUNCTION_GEMMA, [function], added, must=True, parallel=True))
    text = "<start_function_call>call:weather{l:[<escape>a"
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        guide.accept(token)
    way = guide.closing.way(guide.matcher, 30)
    assert way is not None
    assert tokenizer.decode(way) == "<escape>],s:<escape><escape>}<end_function_call>"
