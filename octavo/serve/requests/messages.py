"""The messages of a conversation, as clients send them, and as chat templates know them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from octavo.serve.requests.strict import Strict, read_json


class TextPart(Strict):
    type: Literal["text"]
    text: str
    cache_control: dict[str, JsonValue] | None = None


def text_of(content: Any) -> str:
    """The text of a content: a text, parts that have some, or None."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def plain_call(id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call as chat templates know it, and with the arguments' JSON in place of their value as OpenAI's API does."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that put streamed pieces together leave it

    @field_validator("function")
    @classmethod
    def _arguments_are_an_object(cls, function: CalledFunction) -> CalledFunction:
        if function.arguments and not isinstance(read_json(function.arguments), dict):
            raise ValueError("arguments: not a JSON object")
        return function

    def plain(self) -> dict[str, Any]:
        return plain_call(self.id, self.function.name, read_json(self.function.arguments or "{}"))


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    cache_control: dict[str, JsonValue] | None = None
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
        if self.content is None and self.role != "assistant":
            raise ValueError("content: is missing")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates know it: `developer` is the new name of `system`."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": text_of(self.content)}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        return message | self.given(("name", "tool_call_id", "reasoning_content"))
