"""What a family's syntax of calls is, in data: the reader and the grammar are both made of it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def random_id() -> str:
    return f"call_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Syntax:
    """Calls are written in blocks, each within `begin` and `end`:

        begin opening (before NAME between ARGUMENTS after) separator (before NAME …) closing end

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
    quote: str = '"'  # around strings
    bare: bool = False  # the answer begins with a call, without `begin`
    new_id: Callable[[], str] = random_id
    known_id: Callable[[str], str] = str  # an id of another server's, as the template takes it
    read: Callable[[str], Any] = lambda text: load(text)


def load(text: str) -> Any:
    """A JSON value; raises ValueError for what is none, NaN and Infinity in it. Strings may hold line breaks: models
    write them."""
    return json.loads(text, strict=False, parse_constant=_no_number)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")
