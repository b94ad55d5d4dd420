"""Between tokens and text: chat prompts, text that grows with its tokens, stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence as Rows
from typing import Any

from octavo.engine.params import is_text
from octavo.errors import OctavoError

Message = dict[str, Any]  # {"role": "user", "content": …}; a template may know more fields, such as tool_calls
REPLACEMENT = "\ufffd"  # a decoder's mark for bytes that are not yet a character


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: BOS for some, nothing for others."""
    bare, full = list(tokenizer("a", add_special_tokens=False)["input_ids"]), list(tokenizer("a")["input_ids"])
    return full[: next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)]


def encode_chat(
    tokenizer: Any, messages: Rows[Message], tools: Rows[dict[str, Any]] = (), reply: bool = True
) -> list[int]:
    """Token ids of a conversation by the model's chat template, with the prompt for the model's next turn if it is to
    reply.

    `tools` are JSON descriptions of functions the model may call; raises OctavoError where the template has no place
    for them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise OctavoError(
            "this model has no chat template; give one with --chat-template FILE, or use `octavo generate`"
        )
    if tools and not takes_tools(tokenizer):
        raise OctavoError("the model's chat template has no place for tools; give one with --chat-template FILE")
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, add_generation_prompt=reply, return_dict=True
        )
    except Exception as error:  # a template is code of the model's: jinja's errors, and its own raise_exception
        raise OctavoError(f"the model's chat template refused the conversation: {error}") from None
    return list(encoded["input_ids"])


def takes_tools(tokenizer: Any) -> bool:
    """Whether the model's chat template reads `tools`."""
    return re.search(r"\btools\b", tokenizer.get_chat_template(tools=[{}])) is not None


def check_messages(value: Any) -> list[Message]:
    """`value` as messages; raises OctavoError for anything else."""
    if not isinstance(value, list) or not value:
        raise OctavoError("messages is not a list of messages")
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise OctavoError(f'message {i} is not of the form {{"role": "user", "content": "…"}}')
        if not all(is_text(part) for part in message.values()):
            raise OctavoError(f"message {i} holds something else than text")
    return value


class TextStream:
    """The text of a growing list of tokens, without decoding all of it again for each.

    Text is released once it can no longer change: not in the middle of a character, and not while it might be the
    beginning of a stop string. A stop string ends the stream and is not part of the text.
    """

    def __init__(self, tokenizer: Any, stop: Rows[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.decoded = ""  # text of all tokens up to self.read
        self.released = 0  # characters of it that have been given out
        self.context, self.read = 0, 0  # tokens [context, read) set the scene for decoding those after them
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain."""
        self.ids.append(token)
        scene, text = self._decode(self.ids[self.context : self.read]), self._decode(self.ids[self.context :])
        if text.endswith(REPLACEMENT) or len(text) <= len(scene):
            return ""
        self._take(text[len(scene) :])
        return self._release(len(self.decoded) - self._held_back())

    def flush(self) -> str:
        """The rest of the text, half characters and half stop strings included."""
        if not self.stopped:
            rest = self._decode(self.ids[self.context :])
            self._take(rest[len(self._decode(self.ids[self.context : self.read])) :])
        return self._release(len(self.decoded))

    @property
    def text(self) -> str:
        """What has been released so far."""
        return self.decoded[: self.released]

    def _take(self, new: str) -> None:
        start = max(0, len(self.decoded) - max(map(len, self.stop), default=0))
        self.decoded += new
        self.context, self.read = self.read, len(self.ids)
        found = [at for at in (self.decoded.find(stop, start) for stop in self.stop) if at >= 0]
        if found:
            self.decoded = self.decoded[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if self.stopped:
            return 0
        return max((_overlap(self.decoded, stop) for stop in self.stop), default=0)

    def _release(self, end: int) -> str:
        start, self.released = self.released, max(self.released, end)
        return self.decoded[start : self.released]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` `stop` begins with, short of all of it."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
