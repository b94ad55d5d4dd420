"""Gemma 4 and FunctionGemma: `call:NAME{key:value,…}` between two special tokens, strings between two others. Gemma 3
and older have no template for tools."""

import re
from functools import partial

from octavo.serve.calls.gemma.grammar import rules
from octavo.serve.calls.gemma.reading import read
from octavo.serve.calls.syntax import Syntax

HEAD = re.compile(r"\s*call:\s*(?P<name>[\w.-]+)\s*")


def _syntax(family: str, begin: str, end: str, quote: str, stop: str) -> Syntax:
    return Syntax(
        family=family,
        begin=begin,
        end=end,
        before="call:",
        between="",
        after="",
        joint="",
        head=HEAD,
        marks=(begin, end, quote),
        quote=quote,
        stop=stop,
        read=partial(read, quote=quote),
        rules=partial(rules, quote=quote),
    )


GEMMA4 = _syntax("Gemma 4", "<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>")
FUNCTION_GEMMA = _syntax(
    "FunctionGemma", "<start_function_call>", "<end_function_call>", "<escape>", "<start_function_response>"
)
