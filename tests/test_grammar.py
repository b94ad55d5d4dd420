"""Answers by a JSON schema, for Python users too."""

from __future__ import annotations

import json

import pytest

from octavo import LLM, OctavoError, SamplingParams
from octavo.models.model import Model

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
    alone = llm.generate("The cat", free)[0].tokens
    beside = llm.generate(["The cat", "A dog"], [free, SamplingParams(max_tokens=20, json_schema=PET)])[0].tokens
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
