"""The families of chat templates whose calls are known, each as a syntax in data, and one syntax for all others.

plain JSON   the answer is JSON, one call or a list of them, as OpenAI's API names their parts
Hermes       Hermes 2 and 3, Qwen 2.5 and 3, and those that took it over: `<tool_call>`, one call, `</tool_call>`
Mistral      `[TOOL_CALLS]`, and then a list of calls (tokenizers up to version 7), or a function's name, `[ARGS]`
             and arguments, all of it again for each call (from version 11 on). Ids are nine letters and digits; the
             templates refuse others
InternLM     2, 2.5 and 3: `<|action_start|><|plugin|>`, one call with `parameters`, `<|action_end|>`
Llama        3.1, 3.2 and 3.3: the answer is one call with `parameters`; `<|python_tag|>` may come before it. Their
             own template takes one call in a message; several are separated by `; `
Gemma        is not JSON: gemma/
"""

import re
import secrets
import string
from dataclasses import replace
from hashlib import blake2b

from octavo.serve.calls.gemma import FUNCTION_GEMMA, GEMMA4
from octavo.serve.calls.syntax import Syntax

LETTERS = string.ascii_letters + string.digits
ID = re.compile(r"[a-zA-Z0-9]{9}")


def _new_id() -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(9))


def _known_id(id: str) -> str:
    return id if ID.fullmatch(id) else blake2b(id.encode(errors="replace")).hexdigest()[:9]


PLAIN = Syntax(family="plain JSON", bare=True, joint=None)
HERMES = Syntax(family="Hermes", begin="<tool_call>", end="</tool_call>", opening="\n", closing="\n")
MISTRAL_LIST = Syntax(
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
MISTRAL_NAMED = Syntax(
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
INTERNLM = Syntax(
    family="InternLM",
    between='", "parameters": ',
    begin="<|action_start|><|plugin|>",
    end="<|action_end|>",
    opening="\n",
    marks=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
)
LLAMA = Syntax(
    family="Llama 3",
    between='", "parameters": ',
    begin="<|python_tag|>",
    bare=True,
    separator="; ",
    joint=None,
    marks=("<|python_tag|>",),
)


def syntax_of(template: str) -> Syntax:
    """The syntax of calls that a chat template teaches."""
    if "<tool_call>" in template and "arguments" in template and "<arg_key>" not in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        if "[ARGS]" in template:
            return MISTRAL_NAMED
        return replace(MISTRAL_LIST, opening=" [") if "[TOOL_CALLS] [" in template else MISTRAL_LIST
    if "<|plugin|>" in template:
        return INTERNLM
    for gemma in (GEMMA4, FUNCTION_GEMMA):
        if gemma.begin in template:
            return gemma
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return replace(LLAMA, separator=None) if "only supports single tool-calls" in template else LLAMA
    return PLAIN
