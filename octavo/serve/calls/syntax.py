"""What a family's syntax of calls is, in data: the reader and the grammar are both made of it."""

import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.grammars.sources import json_rule


def random_id() -> str:
    return f"call_{uuid.uuid4().hex}"


Rules = Callable[[str, Mapping[str, Any], Callable[[str], str]], list[str]]


def json_rules(name: str, schema: Mapping[str, Any], _: Callable[[str], str]) -> list[str]:
    """The rule of this name, in Lark's form: JSON that matches the schema. The last argument writes a text as a part of
    the grammar."""
    return [f"{name}: {json_rule(schema)}"]


@dataclass(frozen=True)
class Syntax:
    """Calls are written in blocks, each within `begin` and `end`:

        begin opening (before NAME between ARGUMENTS rest after) separator (before NAME …) closing end

    Models do not keep to it exactly unless they are held to it, so a block is read as `begin`, then JSON values that
    are calls (or, with `head`, a name and then JSON arguments), then `end`.
    """

    family: str
    before: str = '{"name": "'
    between: str = '", "arguments": '
    after: str = "}"
    begin: str = ""
    end: str = ""
    opening: str = ""
    closing: str = ""
    separator: str | None = None  # between the calls of one block; None: a block has one call
    joint: str | None = "\n"  # between blocks; None: an answer has one block
    head: re.Pattern[str] | None = None  # what stands before the arguments, with a group `name`
    marks: tuple[str, ...] = ()  # the special tokens in it, which texts are otherwise shown without
    stop: str = ""  # the special token that a model writes after its calls, where results follow in the same message
    quote: str = '"'  # around strings
    bare: bool = False  # the answer begins with a call, without `begin`
    new_id: Callable[[], str] = random_id
    known_id: Callable[[str], str] = str  # an id of another server's, as the template takes it
    rest: str = ""  # what may stand between ARGUMENTS and `after`, as a part of a grammar in Lark's form
    read: Callable[[str], Any] = lambda text: load(text)
    rules: Rules = json_rules  # of arguments that match a schema

    @property
    def json(self) -> bool:
        """Whether arguments are JSON, so that they can be passed on as they come."""
        return self.rules is json_rules


def load(text: str) -> Any:
    """A JSON value; raises ValueError for what is none, NaN and Infinity in it. Strings may hold line breaks: models
    write them."""
    return json.loads(text, strict=False, parse_constant=_no_number)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")
