"""Answers by a JSON schema, for Python users too."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, OctavoError, SamplingParams
from octavo.grammars import Grammars
from octavo.models.model import Model
from octavo.models.tokenizer import load_tokenizer
from tests.models.test_internlm import TOKENIZER_V1, V1, tokenizer_files, vocabulary

PET = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 9},
        "tags": {"type": "array", "items": {"enum": ["big", "small"]}, "maxItems": 2},
    },
    "required": ["name", "legs", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(pamphlet: Model) -> LLM:
    return LLM(pamphlet, kv="fp32", session_len=512, max_batch_size=4)


def test_answers_match_the_schema_beside_others_that_have_none(llm: LLM):
    schemas = [PET, None, {"type": "object"}, {"enum": [1, "two", None]}]
    params = [
        SamplingParams(max_tokens=200, temperature=1.5, top_k=40, seed=i, json_schema=s) for i, s in enumerate(schemas)
    ]
    pet, _, _, one = llm.generate(["Once upon a time"] * 4, params)
    value = json.loads(pet.text)
    assert value.keys() == {"name", "legs", "tags"}
    assert len(value["name"]) <= 12
    assert 0 <= value["legs"] <= 9
    assert set(value["tags"]) <= {"big", "small"}
    assert pet.finish_reason == "stop"
    assert json.loads(one.text) in (1, "two", None)


def test_a_schema_costs_the_answer_beside_it_nothing(llm: LLM):
    free = SamplingParams(max_tokens=20, temperature=1, seed=3)
    alone = llm.generate("The cat", free)[0].token_ids
    beside = llm.generate(["The cat", "A dog"], [free, SamplingParams(max_tokens=20, json_schema=PET)])[0].token_ids
    assert beside == alone


@pytest.mark.parametrize(
    "schema",
    [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"not": {"type": "string"}}, {"type": "string", "pattern": "(a"}],
    ids=str,
)
def test_a_schema_that_cannot_be_enforced_is_refused(llm: LLM, schema: dict[str, object]):
    with pytest.raises(OctavoError, match="the JSON schema cannot be served"):
        llm.generate("A", SamplingParams(json_schema=schema))
    assert not llm.engine.busy


def test_a_schema_has_an_end():
    with pytest.raises(OctavoError, match="exclude each other"):
        SamplingParams(json_schema=PET, ignore_eos=True)


@pytest.mark.parametrize(
    "schema", [{"const": float("nan")}, {"const": "\ud800"}, {"const": object()}], ids=["NaN", "half a pair", "object"]
)
def test_a_schema_that_json_cannot_write_is_refused(llm: LLM, schema: dict[str, object]):
    with pytest.raises(OctavoError, match="the JSON schema cannot be served") as refusal:
        llm.generate("A", SamplingParams(json_schema=schema))
    assert refusal.value.field == "json_schema"


def test_a_schema_that_takes_too_long_to_compile_is_refused(pamphlet: Model, monkeypatch: pytest.MonkeyPatch):
    grammars = Grammars(pamphlet.tokenizer, pamphlet.bound.vocab_size, [0])
    grammars.prepare()
    monkeypatch.setattr("octavo.grammars.guides.COMPILE_SECONDS", 0)
    large = {"type": "object", "properties": {f"pet {i}": PET for i in range(200)}}
    with pytest.raises(OctavoError, match="compiling it takes more than 0 s"):
        grammars.guide("json_schema", large)


def test_answers_to_one_schema_go_their_own_ways(llm: LLM):
    one = SamplingParams(max_tokens=60, temperature=1.5, json_schema={"enum": [1, "two"]})
    params = [replace(one, seed=i) for i in range(6)]
    assert {json.loads(answer.text) for answer in llm.generate(["A"] * 6, params)} == {1, "two"}


def test_a_sentencepiece_tokenizer_is_kept_to_a_schema_too(tmp_path: Path):
    tokenizer = load_tokenizer(tokenizer_files(tmp_path, V1, vocabulary(), TOKENIZER_V1))
    size, end = len(tokenizer) + 3, tokenizer.eos_token_id
    guide, random = Grammars(tokenizer, size, {end}).guide("json_schema", PET), torch.Generator().manual_seed(0)
    tokens: list[int] = []
    while end not in tokens:
        row = torch.zeros(size)
        guide.restrict(row, 1000)
        tokens.append(int(row.softmax(-1).multinomial(1, generator=random)))
        guide.accept(tokens[-1])
    value = json.loads(tokenizer.decode(tokens, skip_special_tokens=True))
    assert value.keys() == {"name", "legs", "tags"}
    assert len(value["name"]) <= 12


def test_a_tokenizer_that_the_grammar_library_cannot_read_is_refused():
    with pytest.raises(OctavoError, match="fast tokenizers"):
        Grammars(object(), 10, {1}).guide("json_schema", PET)


NODE = {
    "type": "object",
    "properties": {"v": {"type": "string"}, "c": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
}
UNBOUNDED: dict[str, dict[str, Any]] = {
    "a string": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    "an array": {"type": "array", "items": {"type": "integer"}},
    "any object": {"type": "object"},
    "a tree": {"$defs": {"n": {**NODE, "required": ["v", "c"], "additionalProperties": False}}, "$ref": "#/$defs/n"},
    "an object that is large once it is begun": {
        "type": "object",
        "properties": {"big": {"type": "object", "required": [f"key {i}" for i in range(9)]}, "s": {"maxLength": 5}},
        "required": ["s"],
    },
    "patterns and least lengths": {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            "text": {"type": "string", "minLength": 20},
            "list": {"type": "array", "items": {"enum": ["alpha", "beta"]}, "minItems": 2},
        },
        "required": ["day", "code", "text", "list"],
    },
}


@pytest.mark.parametrize("schema", UNBOUNDED.values(), ids=UNBOUNDED)
def test_an_answer_that_would_not_end_is_ended_as_its_schema_demands(pamphlet: Model, schema: dict[str, Any]):
    """Whatever tokens a model prefers, here at random, and however few it has: the document is whole, and matches."""
    grammars = Grammars(pamphlet.tokenizer, pamphlet.bound.vocab_size, pamphlet.eos_ids)
    random, cut = torch.Generator().manual_seed(0), 0
    guide = grammars.guide("json_schema", schema)
    least = len(guide.closing.way(guide.matcher, 1000) or ())
    for spare in (0, 6, 12, 24, 48):
        guide, tokens = grammars.guide("json_schema", schema), list[int]()
        for room in range(least + spare, 0, -1):
            row = torch.randn(pamphlet.bound.vocab_size, generator=random) * 4
            guide.restrict(row, room)
            token = int(row.softmax(-1).multinomial(1, generator=random))
            if token in pamphlet.eos_ids:
                break
            tokens.append(token)
            guide.accept(token)
        assert guide.matcher.is_accepting(), pamphlet.tokenizer.decode(tokens)
        json.loads(pamphlet.tokenizer.decode(tokens))
        cut += guide.cut
    assert cut > 1


def test_a_text_with_the_name_of_a_special_token_in_it_is_spelled(pamphlet: Model):
    tokenizer = copy.deepcopy(pamphlet.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</tool_call>"]})
    grammars = Grammars(tokenizer, len(tokenizer), pamphlet.eos_ids)
    said = "a </tool_call> b"
    guide, tokens = grammars.guide("json_schema", {"const": said}), list[int]()
    for room in range(60, 0, -1):
        row = torch.zeros(len(tokenizer))
        guide.restrict(row, room)
        assert row.max() > -torch.inf
        if (token := int(row.argmax())) in pamphlet.eos_ids:
            break
        tokens.append(token)
        guide.accept(token)
    assert json.loads(tokenizer.decode(tokens)) == said


def test_the_way_to_an_end_has_as_few_tokens_as_the_vocabulary_allows(pamphlet: Model):
    """What is still open is closed by tokens of several signs where the model has them."""
    grammars = Grammars(pamphlet.tokenizer, pamphlet.bound.vocab_size, pamphlet.eos_ids)
    nested = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}}}}
    for schema, text in ((nested, '{"a": {"a": {"a": {'), ({"type": "array"}, '[[[["x')):
        guide = grammars.guide("json_schema", schema)
        for token in pamphlet.tokenizer(text, add_special_tokens=False)["input_ids"]:
            guide.accept(token)
        way = guide.closing.way(guide.matcher, 100)
        assert way is not None
        closed = pamphlet.tokenizer.decode(way)
        assert json.loads(text + closed)
        assert len(way) <= len(pamphlet.tokenizer(closed, add_special_tokens=False)["input_ids"])


def test_an_end_that_tokens_forced_is_told_as_one(llm: LLM):
    params = [
        SamplingParams(max_tokens=n, temperature=1.5, top_k=50, seed=n, json_schema=UNBOUNDED["a string"])
        for n in (8, 14, 25, 40)
    ]
    answers = llm.generate(["Once upon a time"] * len(params), params)
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert all(json.loads(answer.text)["name"] for answer in answers[1:])
    [whole] = llm.generate("A", SamplingParams(max_tokens=60, json_schema={"enum": [1]}))
    assert (whole.text, whole.finish_reason) == ("1", "stop")
    [soon] = llm.generate("A", SamplingParams(max_tokens=8, regex="[0-9]{3}"))
    assert soon.finish_reason == "stop", "few tokens are left, and none was needed"


def test_an_answer_that_tokens_forced_to_end_is_whole_where_special_tokens_are_shown(llm: LLM):
    shown = SamplingParams(
        max_tokens=20, temperature=1.5, top_k=50, seed=8, skip_special_tokens=False, json_schema=UNBOUNDED["a string"]
    )
    [answer] = llm.generate("Once upon a time", shown)
    assert (answer.finish_reason, answer.token_ids[-1] in llm.model.eos_ids) == ("length", True)
    assert json.loads(answer.text)


def test_lengths_that_a_schema_sets_are_kept(llm: LLM):
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "maxLength": 4},
            "b": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    params = [SamplingParams(max_tokens=200, temperature=1.5, seed=i, json_schema=schema) for i in range(4)]
    for answer in llm.generate(["Once upon a time"] * 4, params):
        value = json.loads(answer.text)
        assert len(value["a"]) <= 4
        assert len(value["b"]) <= 2
        assert all(len(one) <= 3 for one in value["b"])
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"regex": "(ab){2}c?"}, {"abab", "ababc"}),
        ({"choice": ["yes", "no"]}, {"yes", "no"}),
        ({"grammar": 'start: "x" | "yy"'}, {"x", "yy"}),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_answers_may_match_expressions_choices_and_grammars(llm: LLM, constraint: Any, expected: set[str]):
    params = [SamplingParams(max_tokens=40, temperature=1.5, seed=i, **constraint) for i in range(6)]
    assert {answer.text for answer in llm.generate(["A"] * 6, params)} <= expected
