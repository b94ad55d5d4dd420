"""What an answer is to match: OpenAI's `response_format`, and the names that vLLM and llama.cpp have for the same."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from octavo.engine.params import CONSTRAINTS, TABLE
from octavo.engine.values import Strings
from octavo.serve.requests.strict import Name, Schema, Strict

_choices = TABLE["choice"].kind
assert isinstance(_choices, Strings)
Text = Annotated[str, Field(min_length=1)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_choices.length)]],
    Field(min_length=1, max_length=_choices.count, fail_fast=True),
]


class NamedSchema(Strict):
    name: Name
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _schema_of_schemas(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: belongs to the type json_schema, and it alone")
        return self

    @property
    def schema_of_answers(self) -> Schema | None:
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.schema_ if self.json_schema else None


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`."""

    json_: Annotated[str | Schema | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None


class Constrained(Strict):
    """The fields that constrain answers. At most one of them may be given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    json_schema: Schema | None = Field(None, description="llama.cpp's name of a JSON schema.")
    grammar: Text | None = Field(None, description="llama.cpp's name of a grammar.")

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        given = self._given()
        if len(given) > 1:
            raise ValueError(f"{given[1][0]}: an answer can match {given[0][0]} or {given[1][0]}, not both")
        if given and given[0][1] == "json_schema" and not isinstance(given[0][2], dict):
            raise ValueError(f"{given[0][0]}: is no JSON schema, that is an object")
        return self

    @property
    def constraint(self) -> dict[str, Any]:
        """The field of SamplingParams that says what answers match, if one does."""
        return {name: value for _, name, value in self._given()}

    def _given(self) -> list[tuple[str, str, Any]]:
        """(field, parameter, value) of each constraint."""
        outputs = self.structured_outputs or StructuredOutputs()
        json_object: Schema | None = {"type": "object"} if outputs.json_object else None
        form = self.response_format.schema_of_answers if self.response_format else None
        found = [
            ("response_format", "json_schema", form),
            ("structured_outputs", "json_schema", _schema(outputs.json_)),
            ("structured_outputs", "json_schema", json_object),
            *(("structured_outputs", name, getattr(outputs, name)) for name in CONSTRAINTS if name != "json_schema"),
            ("guided_json", "json_schema", _schema(self.guided_json)),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
            ("json_schema", "json_schema", self.json_schema),
            ("grammar", "grammar", self.grammar),
        ]
        return [one for one in found if one[2] is not None]


def _schema(given: str | Schema | None) -> Any:
    """A schema may be sent as the text of its JSON; a text that is none stays one, and is refused."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given
