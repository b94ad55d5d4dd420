"""`POST /v1/messages`, as Anthropic's API has it."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from octavo.engine.params import TABLE
from octavo.serve.requests.generate import Conversation, GenerateRequest
from octavo.serve.requests.messages import TextPart, plain_call, text_of
from octavo.serve.requests.sampling import http
from octavo.serve.requests.strict import Name, Schema, Strict
from octavo.serve.requests.tools import calls
from octavo.text import Message

Cache = dict[str, JsonValue] | None


class Text(TextPart):
    citations: Annotated[list[JsonValue], Field(max_length=0)] | None = None


class ToolUse(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Schema
    cache_control: Cache = None
    caller: JsonValue = None


class ToolResult(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Text] | None = None
    is_error: bool | None = None
    cache_control: Cache = None


class Thinking(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


Block = Annotated[Text | ToolUse | ToolResult | Thinking, Field(discriminator="type")]


class AnthropicMessage(Strict):
    role: Literal["user", "assistant"]
    content: str | list[Block]

    @model_validator(mode="after")
    def _blocks_of_roles(self) -> Self:
        for block in self.content if isinstance(self.content, list) else ():
            if isinstance(block, ToolResult) != (self.role == "user") and not isinstance(block, Text):
                raise ValueError(f"content: {block.type} is not in a message of role {self.role}")
        return self

    def plain(self) -> Iterator[Message]:
        """The messages of a chat template that it stands for: results of tools are messages of their own."""
        blocks = [Text(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        if self.role == "assistant":
            yield _said(blocks)
            return
        text = ""
        for block in blocks:
            if isinstance(block, ToolResult):
                if text:
                    yield {"role": "user", "content": text}
                text = ""
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text_of(block.content)}
            elif isinstance(block, Text):
                text += block.text
        if text or not any(isinstance(block, ToolResult) for block in blocks):
            yield {"role": "user", "content": text}


def _said(blocks: list[Any]) -> Message:
    said: Message = {"role": "assistant", "content": text_of([one for one in blocks if isinstance(one, Text)])}
    if thought := "".join(one.thinking for one in blocks if isinstance(one, Thinking)):
        said["reasoning_content"] = thought
    if uses := [one for one in blocks if isinstance(one, ToolUse)]:
        said["tool_calls"] = [plain_call(one.id, one.name, one.input) for one in uses]
    return said


class AnthropicTool(Strict):
    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: Schema
    strict: bool | None = None
    cache_control: Cache = None
    input_examples: list[JsonValue] | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _name_of_tools(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name: belongs to the type tool, and it alone")
        return self


class Format(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]


class OutputConfig(Strict):
    format: Format | None = None
    effort: str | None = None


class ThinkingConfig(Strict):
    """Templates that can turn thinking on and off are told; a budget has no effect."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class Conversing(Strict):
    """What messages and the count of their tokens share."""

    model: str
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[Text] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None  # the older name of output_config.format
    cache_control: Cache = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.choice()["functions"] and self.format is not None:
            raise ValueError("output_config: excludes calls of tools, unless tool_choice is none")
        return self

    @property
    def format(self) -> Format | None:
        return (self.output_config.format if self.output_config else None) or self.output_format

    def choice(self) -> dict[str, Any]:
        """The fields of Conversation that are about calls."""
        choice = self.tool_choice or ToolChoice(type="auto")
        functions = [_function(tool) for tool in self.tools or ()]
        must = choice.type in ("any", "tool")
        return calls(functions, choice.type != "none", must, choice.name, not choice.disable_parallel_tool_use)

    def conversation(self) -> Conversation:
        system = [{"role": "system", "content": text_of(self.system)}] if self.system else []
        go_on = self.messages[-1].role == "assistant"
        return Conversation(
            [*system, *(plain for message in self.messages for plain in message.plain())],
            reply=not go_on,
            go_on=go_on,  # the answer's beginning is given
            variables={"enable_thinking": self.thinking.type != "disabled"} if self.thinking else {},
            **self.choice(),
        )


def _function(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {name: value for name, value in {**function, "strict": tool.strict}.items() if value is not None}


class CountRequest(Conversing):
    """`POST /v1/messages/count_tokens`."""


class MessagesRequest(Conversing):
    max_tokens: http(TABLE["max_tokens"].kind)  # type: ignore[valid-type]
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)] | None = None
    stream: bool | None = None
    temperature: http(TABLE["temperature"].kind) | None = None  # type: ignore[valid-type]
    top_p: http(TABLE["top_p"].kind) | None = None  # type: ignore[valid-type]
    top_k: http(TABLE["top_k"].kind) | None = None  # type: ignore[valid-type]
    metadata: dict[str, JsonValue] | None = None
    service_tier: str | None = None

    def generate_request(self) -> GenerateRequest:
        """What it asks for, in the form that all routes share."""
        sampling = self.given(("max_tokens", "temperature", "top_p", "top_k"))
        if self.stop_sequences:
            sampling["stop"] = self.stop_sequences
        if self.format is not None:
            sampling["json_schema"] = self.format.schema_
        names = {"stop": "stop_sequences", "json_schema": "output_config"}
        return GenerateRequest([self.conversation()], sampling, stream=bool(self.stream), usage=True, names=names)


def input_of(arguments: str) -> Any:
    """A call's arguments as the object they are; one that was cut off is what there is of it, as text."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return {"incomplete": arguments}
