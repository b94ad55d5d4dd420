"""The functions that a model may call, and which it must."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import model_validator

from octavo.serve.requests.strict import Name, Schema, Strict


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Typed(Strict):
    type: Literal["function"]


class Tool(Typed):
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Typed):
    function: NamedFunction


class FlatTool(Function, Typed):
    """Of responses, which name a function without the level in between."""

    @property
    def function(self) -> Function:
        return self


class NamedFlatTool(NamedFunction, Typed):
    @property
    def function(self) -> NamedFunction:
        return self


T = TypeVar("T", Tool, FlatTool)
N = TypeVar("N", NamedTool, NamedFlatTool)


def calls(
    functions: Sequence[Mapping[str, Any]], may: bool, must: bool, only: str | None, parallel: bool
) -> dict[str, Any]:
    """The fields of Conversation that are about calls, of `functions` that an answer `may` call. Raises ValueError,
    which begins with the field, for two of one name, for a call that is demanded where there are none, and for one of
    a function that is not there."""
    names = [function["name"] for function in functions]
    if len(names) != len(set(names)):
        raise ValueError("tools: two have the same name")
    if must and not names:
        raise ValueError("tool_choice: there are no tools")
    if only is not None and only not in names:
        raise ValueError("tool_choice: there is no tool of that name")
    return {"functions": functions if may else [], "must_call": must, "only": only, "parallel": parallel}


class Tools(Strict, Generic[T, N]):
    """The fields of OpenAI's routes that are about calls."""

    tools: list[T] | None = None
    tool_choice: Literal["none", "auto", "required"] | N | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _tools_that_are_chosen(self) -> Self:
        self.choice()
        return self

    def choice(self) -> dict[str, Any]:
        """The fields of Conversation that are about calls."""
        functions = [tool.function.model_dump(exclude_none=True, exclude={"type"}) for tool in self.tools or ()]
        only = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool | NamedFlatTool) else None
        must = only is not None or self.tool_choice == "required"
        return calls(functions, self.tool_choice != "none", must, only, self.parallel_tool_calls is not False)
