"""What may be asked: the requests of OpenAI's API that are implemented, field by field.

A field that is not here is refused by name, as is a value of the wrong type. The fields of sampling, OpenAI's own and
those beyond, are made from the table of request parameters (engine/params.py). Four fields have no effect by their
definition, since they describe the caller to the provider: `user`, `safety_identifier`, `metadata` and
`prompt_cache_key`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from octavo.engine.params import (
    MAX_TOKENS,
    TABLE,
    Biases,
    Kind,
    Number,
    SamplingParams,
    Strings,
    Switch,
    TokenIds,
    allowed,
)
from octavo.serve.errors import ApiError
from octavo.serve.limits import FirstError, check_json

Int31 = Annotated[int, Field(ge=0, lt=1 << 31)]
Schema = dict[str, JsonValue]


class Strict(FirstError):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None


def _http(kind: Kind) -> Any:
    """What a row of the request parameters' table takes, for pydantic and OpenAPI. SamplingParams checks it again."""
    match kind:
        case Number(low, high, whole, above):
            least = Field(gt=low) if above else Field(ge=low)
            return Annotated[int if whole else float, least, Field(le=high)]
        case Switch():
            return bool
        case Strings(count, length):
            one: Any = Annotated[str, Field(min_length=1, max_length=length)]
            return one | Annotated[list[one], Field(max_length=count, fail_fast=True)]
        case TokenIds(count):
            return Int31 | Annotated[list[Int31], Field(max_length=count, fail_fast=True)]
        case Biases(low, high, count):
            key, bias = Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=low, le=high)]
            return Annotated[dict[key, bias], Field(max_length=count)]  # type: ignore[valid-type]
    raise TypeError(f"{type(kind).__name__} has no form over HTTP")


_rows: dict[str, Any] = {
    name: (_http(rule.kind) | None, Field(None, description=rule.help)) for name, rule in allowed("HTTP").items()
}
_Table: Any = create_model("_Table", __base__=Strict, **_rows)


class Sampling(_Table):
    """What both kinds of request share. Absent fields are the model's own defaults."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _options_of_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream=true")
        return self

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, **more: Any) -> dict[str, Any]:
        """The fields of SamplingParams that the request sets."""
        given = {name: value for name in allowed("HTTP") if (value := getattr(self, name)) is not None}
        given.pop("logprobs", None)  # each kind of request has its own form of it
        return given | {name: value for name, value in more.items() if value is not None}


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[Int31] | list[list[Int31]]
    echo: bool | None = None

    @model_validator(mode="after")
    def _prompts(self) -> Self:
        if not self.prompt:
            raise ValueError("prompt: is empty")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: not supported together with logprobs")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast(list[str | list[int]], [self.prompt] if one else self.prompt)

    def params(self, defaults: dict[str, Any]) -> SamplingParams:
        return SamplingParams(**{"max_tokens": 16} | defaults | self.sampling(logprobs=self.logprobs))


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    @field_validator("function")
    @classmethod
    def _arguments_are_an_object(cls, function: CalledFunction) -> CalledFunction:
        if not isinstance(_json(function.arguments), dict):
            raise ValueError("arguments: not a JSON object")
        return function

    def plain(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": _json(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Clients send answers back as they got them, with what OpenAI's own have and these have not.
    refusal: None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _fields_of_roles(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: not in a message of role {self.role}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id: not in a message of role {self.role}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: is missing")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())

    def plain(self) -> dict[str, Any]:
        """The message as chat templates know it: `developer` is the new name of `system`."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
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
    def answer_schema(self) -> Schema | None:
        """The JSON schema that answers must match."""
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.schema_ if self.json_schema else None


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: _http(TABLE["max_tokens"].kind) | None = None  # type: ignore[valid-type]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: the old name of max_completion_tokens; give one of them")
        names = [tool.function.name for tool in self.tools or ()]
        if len(names) != len(set(names)):
            raise ValueError("tools: two have the same name")
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice: there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice: there is no tool of that name")
        if any(tool.function.strict for tool in self.tools or ()) and not self.demands_call:
            raise ValueError("tools: strict is honoured with tool_choice 'required' or a named function only")
        if names and self.tool_choice != "none" and self.answer_schema is not None:
            raise ValueError("response_format: excludes calls of tools, unless tool_choice is none")
        return self

    @property
    def demands_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def answer_schema(self) -> Schema | None:
        return self.response_format.answer_schema if self.response_format else None

    def params(self, defaults: dict[str, Any], schema: Schema | None) -> SamplingParams:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        own = self.sampling(max_tokens=self.max_completion_tokens, logprobs=logprobs, json_schema=schema)
        return SamplingParams(**{"max_tokens": MAX_TOKENS} | defaults | own)


def _json(text: str) -> Any:
    """The value that `text` is; None if it is none."""
    try:
        return from_json(text)
    except ValueError:
        return None


TAGS = ("str", "int", "constrained-str", "NamedTool")
R = TypeVar("R", bound=BaseModel)


def parse(body: bytes, kind: type[R], longest: int) -> R:
    """The request in `body`, none of whose lists has more than `longest` elements; raises ApiError 400 with the name of
    the first field that is wrong."""
    check_json(body, longest)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a union every member complains: the one that came furthest is meant. Its tag is no part of the field's name.
    first = max((one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]), key=lambda one: len(one["loc"]))
    where = ".".join(str(part) for part in first["loc"] if part not in TAGS and "[" not in str(part))
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"{where}: there is no such field, or it is not supported", param=where, code="unknown")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        name = message.partition(":")[0]
        where = f"{where}.{name}" if where else name
        message = message.partition(": ")[2]
    raise ApiError(400, f"{where}: {message}" if where else message, param=where or None)
