"""What users pass to `LLM.generate` and `LLM.chat`, made into one form: all that vLLM's `LLM` takes for text.

What is none of it is refused in one sentence that names the argument.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from numbers import Integral
from typing import Any

from octavo.engine.params import SamplingParams
from octavo.engine.values import brief, is_number, is_text
from octavo.errors import OctavoError
from octavo.text import Message

Prompt = str | Rows[int] | Mapping[str, Any]
PROMPT = 'text, token ids, or a dict like {"prompt": "…"} or {"prompt_token_ids": […]}'
MESSAGE = '{"role": "user", "content": "…"}'


def read_prompts(given: Any, name: str = "prompts") -> list[str | list[int]]:
    """One prompt or several, as several."""
    given = _listed(given)
    if isinstance(given, str | Mapping) or (isinstance(given, list) and given and is_number(given[0], Integral)):
        return [read_prompt(given, name)]
    if not isinstance(given, list):
        raise OctavoError(f"{name} is {brief(given)}; it must be {PROMPT}, or a list of these", name)
    return [read_prompt(one, f"{name}[{i}]") for i, one in enumerate(given)]


def read_prompt(given: Any, name: str = "prompt") -> str | list[int]:
    """One prompt: its text or its token ids."""
    given = _listed(given)
    if isinstance(given, Mapping):
        if len(given) != 1 or not given.keys() <= {"prompt", "prompt_token_ids"}:
            raise OctavoError(f"{name} has the keys {brief(list(given))}; it must be {PROMPT}", name)
        [(key, value)] = given.items()
        name, given = f"{name}[{key!r}]", _listed(value)
        if isinstance(given, list) != (key == "prompt_token_ids"):
            raise OctavoError(f"{name} is {brief(given)}; it must be {PROMPT}", name)
    if isinstance(given, str):
        if not is_text(given):
            raise OctavoError(f"{name} holds half of a surrogate pair, which is no character", name)
        return given
    if not isinstance(given, list):
        raise OctavoError(f"{name} is {brief(given)}; it must be {PROMPT}", name)
    for i, token in enumerate(given):
        if not is_number(token, Integral):
            raise OctavoError(f"{name}[{i}] is {brief(token)}; a prompt that is a list holds token ids", name)
    return [int(token) for token in given]


def read_params(given: Any, count: int, default: Callable[[], SamplingParams]) -> list[SamplingParams]:
    """Parameters for each of `count` prompts, of which one may be `given` for all; `default` if None is."""
    if given is None:
        return [default()] * count
    if isinstance(given, SamplingParams):
        return [given] * count
    several = _listed(given)
    if not isinstance(several, list) or not all(isinstance(one, SamplingParams) for one in several):
        raise OctavoError(
            f"sampling_params is {brief(given)}; it must be SamplingParams(…), or a list with one for each prompt",
            "sampling_params",
        )
    if len(several) != count:
        raise OctavoError(f"{count} prompts but {len(several)} sampling parameters", "sampling_params")
    return several


def is_conversation(given: Any) -> bool:
    """Whether it is a list that begins with a message: a dict with a role."""
    return isinstance(given, list | tuple) and bool(given) and isinstance(given[0], Mapping) and "role" in given[0]


def read_conversations(given: Any, name: str = "messages") -> tuple[list[list[Message]], bool]:
    """The conversations of a list of them, or the one that `given` is; and whether it is one."""
    if isinstance(given, list | tuple) and given and isinstance(given[0], list | tuple):
        return [read_messages(one, f"{name}[{i}]") for i, one in enumerate(given)], False
    return [read_messages(given, name)], True


def read_messages(given: Any, name: str = "messages") -> list[Message]:
    """A conversation's messages, each content as text. What else a message has is the chat template's."""
    if not isinstance(given, list | tuple) or not given:
        raise OctavoError(f"{name} is {brief(given)}; it must be a list of messages like {MESSAGE}", name)
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(given)]


def _message(given: Any, name: str) -> Message:
    if not isinstance(given, Mapping) or not is_text(given.get("role")):
        raise OctavoError(f"{name} is {brief(given)}; it must be a message like {MESSAGE}", name)
    content = given.get("content")
    if content is None and given.get("tool_calls"):
        return dict(given)
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{name}['content'][{i}]") for i, part in enumerate(content))
    if not is_text(content):
        raise OctavoError(f"{name}['content'] is {brief(content)}; it must be text, or a list of parts of text", name)
    return {**given, "content": content}


def _part(given: Any, name: str) -> str:
    """The text of a content part; a string is one too."""
    if isinstance(given, str):
        return given
    kind = given.get("type") if isinstance(given, Mapping) else None
    if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file")):
        raise OctavoError(f"{name} is of type {kind!r}: Octavo serves text alone, of models that read more too", name)
    if not isinstance(given, Mapping) or kind != "text" or not isinstance(given.get("text"), str):
        raise OctavoError(f'{name} is {brief(given)}; it must be a part like {{"type": "text", "text": "…"}}', name)
    return given["text"]


def _listed(value: Any) -> Any:
    """Tuples, ranges and arrays as lists; anything else as it is."""
    if hasattr(value, "tolist"):  # numpy's arrays and torch's tensors
        return value.tolist()
    if isinstance(value, Rows) and not isinstance(value, str | bytes | bytearray | memoryview):
        return list(value)
    return value
