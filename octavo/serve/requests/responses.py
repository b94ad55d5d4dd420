"""`POST /v1/responses`, as OpenAI's API of responses has it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from octavo.engine.params import MAX_TOKENS, TABLE
from octavo.serve.requests.generate import Conversation, GenerateRequest
from octavo.serve.requests.messages import plain_call, text_of
from octavo.serve.requests.sampling import http
from octavo.serve.requests.strict import Caller, Name, Schema, Strict, read_json
from octavo.serve.requests.tools import FlatTool, NamedFlatTool, Tools
from octavo.text import Message

Status = Literal["in_progress", "completed", "incomplete"] | None
Nothing = Annotated[list[JsonValue], Field(max_length=0)] | None


class ContentPart(Strict):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str
    annotations: Nothing = None
    logprobs: list[JsonValue] | None = None


class MessageItem(Strict):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    id: str | None = None
    status: Status = None
    phase: str | None = None


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status = None

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> Self:
        if not isinstance(read_json(self.arguments or "{}"), dict):
            raise ValueError("arguments: not a JSON object")
        return self


class OutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]
    id: str | None = None
    status: Status = None


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ContentPart] | None = None
    content: list[ContentPart] | None = None
    encrypted_content: str | None = None
    status: Status = None


ITEMS = {
    "message": "MessageItem",
    "function_call": "CallItem",
    "function_call_output": "OutputItem",
    "reasoning": "ReasoningItem",
}


def _kind(item: Any) -> str | None:
    """The model that reads an item; one without a type is a message."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return ITEMS.get(kind) if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("MessageItem")]
    | Annotated[CallItem, Tag("CallItem")]
    | Annotated[OutputItem, Tag("OutputItem")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")],
    Discriminator(_kind),
]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_of_schemas(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema: belongs to the type json_schema, and it alone")
        return self


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Strict):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class StreamOptions(Strict):
    include_obfuscation: bool | None = None


class ResponsesRequest(Caller, Tools[FlatTool, NamedFlatTool]):
    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    text: TextOptions | None = None
    max_output_tokens: http(TABLE["max_tokens"].kind) | None = None  # type: ignore[valid-type]
    temperature: http(TABLE["temperature"].kind) | None = None  # type: ignore[valid-type]
    top_p: http(TABLE["top_p"].kind) | None = None  # type: ignore[valid-type]
    top_k: http(TABLE["top_k"].kind) | None = None  # type: ignore[valid-type]
    min_p: http(TABLE["min_p"].kind) | None = None  # type: ignore[valid-type]
    seed: http(TABLE["seed"].kind) | None = None  # type: ignore[valid-type]
    stream: bool | None = None
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: Literal[False] | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    # Without effect, as on the other routes.
    reasoning: Reasoning | None = None
    stream_options: StreamOptions | None = None
    max_tool_calls: int | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.answer_schema is not None and self.choice()["functions"]:
            raise ValueError("text: a format excludes calls of tools, unless tool_choice is none")
        if not self.input:
            raise ValueError("input: is empty")
        return self

    @property
    def answer_schema(self) -> Schema | None:
        """The JSON schema that answers match."""
        format = self.text.format if self.text else None
        if format is None or format.type == "text":
            return None
        return format.schema_ or {"type": "object"}

    @property
    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())

    def messages(self) -> list[Message]:
        """The input as messages of a chat template."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        found: list[Message] = []
        for item in self.input:
            _add(found, item)
        return found

    def generate_request(self, before: Sequence[Message]) -> GenerateRequest:
        """What it asks for, in the form that all routes share and in the conversation that was `before` it."""
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        conversation = Conversation(
            _one_system([*instructions, *before, *self.messages()]),
            variables={"reasoning_effort": self.reasoning.effort} if self.reasoning and self.reasoning.effort else {},
            **self.choice(),
        )
        sampling = self.given(("temperature", "top_p", "top_k", "min_p", "seed"))
        sampling["max_tokens"] = self.max_output_tokens or MAX_TOKENS
        if self.answer_schema is not None:
            sampling["json_schema"] = self.answer_schema
        if self.wants_logprobs:
            sampling["logprobs"] = self.top_logprobs or 0
        longest = -1 if self.truncation == "auto" else None
        names = {"max_tokens": "max_output_tokens", "json_schema": "text"}
        return GenerateRequest([conversation], sampling, stream=bool(self.stream), longest_prompt=longest, names=names)


def _add(found: list[Message], item: Item) -> None:
    """Add an item. Calls, and the thoughts before them, belong to the message of the model that they came with."""
    match item:
        case MessageItem():
            role = "system" if item.role == "developer" else item.role
            if role == "assistant" and found and found[-1]["role"] == role and not found[-1].get("tool_calls"):
                found[-1]["content"] += text_of(item.content)
            else:
                found.append({"role": role, "content": text_of(item.content)})
        case CallItem():
            call = plain_call(item.call_id, item.name, read_json(item.arguments or "{}"))
            _assistant(found).setdefault("tool_calls", []).append(call)
        case OutputItem():
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
        case ReasoningItem():
            if thought := text_of(item.content):
                _assistant(found)["reasoning_content"] = thought


def _assistant(found: list[Message]) -> Message:
    """The model's message that is last, or a new one."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    return found[-1]


def _one_system(messages: list[Message]) -> list[Message]:
    """System messages at the beginning, as one: templates take no two."""
    said = []
    for message in messages:
        if message["role"] != "system":
            break
        said.append(message["content"])
    if len(said) < 2:
        return messages
    return [{"role": "system", "content": "\n\n".join(said)}, *messages[len(said) :]]
