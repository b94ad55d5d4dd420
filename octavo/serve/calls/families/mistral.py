"""Mistral: `[TOOL_CALLS]`, and then a JSON list of calls (tokenizers up to version 7), or a function's name, `[ARGS]`
and JSON arguments, all of it again for each call (from version 11 on). Ids are nine letters and digits; the templates
refuse others."""

import re
import secrets
import string
from dataclasses import replace
from hashlib import blake2b

from octavo.serve.calls.syntax import Syntax

LETTERS = string.ascii_letters + string.digits
ID = re.compile(r"[a-zA-Z0-9]{9}")


def _new_id() -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(9))


def _known_id(id: str) -> str:
    return id if ID.fullmatch(id) else blake2b(id.encode(errors="replace")).hexdigest()[:9]


LIST = Syntax(
    family="Mistral",
    begin="[TOOL_CALLS]",
    opening="[",
    separator=", ",
    closing="]",
    rest=r'(", \"id\": \"" /[a-zA-Z0-9]{9}/ "\"")?',
    joint=None,
    marks=("[TOOL_CALLS]",),
    new_id=_new_id,
    known_id=_known_id,
)
SPACED = replace(LIST, opening=" [")
NAMED = Syntax(
    family="Mistral (tokenizer version 11)",
    begin="[TOOL_CALLS]",
    before="",
    between="[ARGS]",
    after="",
    joint="",
    head=re.compile(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*"),
    marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    new_id=_new_id,
    known_id=_known_id,
)


def of(template: str) -> Syntax | None:
    if "[TOOL_CALLS]" not in template:
        return None
    if "[ARGS]" in template:
        return NAMED
    return SPACED if "[TOOL_CALLS] [" in template else LIST
