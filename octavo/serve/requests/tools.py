"""The functions that a model may call, and which it must."""

from collections.abc import Collection
from typing import Any, Literal, Self

from pydantic import model_validator

from octavo.serve.requests.strict import Name, Schema, Strict


class Function(Strict):
    name: Name
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


def check_choice(names: Collection[str], must: bool, only: str | None) -> None:
    """Raise ValueError, which begins with the field, for two functions of one name, for a call that is demanded where
    there are none, and for one of a function that is not there."""
    if len(names) != len(set(names)):
        raise ValueError("tools: two have the same name")
    if must and not names:
        raise ValueError("tool_choice: there are no tools")
    if only is not None and only not in names:
        raise ValueError("tool_choice: there is no tool of that name")


class Tools(Strict):
    """The fields of a chat request that are about calls."""

    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _tools_that_are_chosen(self) -> Self:
        check_choice([tool.function.name for tool in self.tools or ()], self.must_call, self.only)
        return self

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")

    @property
    def only(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def callable(self) -> list[dict[str, Any]]:
        """The functions that an answer may call."""
        if self.tool_choice == "none":
            return []
        return [tool.function.model_dump(exclude_none=True) for tool in self.tools or ()]

    def choice(self) -> dict[str, Any]:
        """The fields of Conversation that are about calls."""
        parallel = self.parallel_tool_calls is not False
        return {"functions": self.callable, "must_call": self.must_call, "only": self.only, "parallel": parallel}
