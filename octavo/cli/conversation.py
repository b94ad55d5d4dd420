"""A conversation with a model: the messages so far, the next answer in pieces, a file to keep it in.

It knows no terminal (see chat.py). The whole conversation is sent with every message; what the cache still holds of it
is found there block by block and not computed again.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.engine.values import is_text
from octavo.errors import OctavoError
from octavo.inputs import read_messages
from octavo.measure.memory.footprint import Footprint

if TYPE_CHECKING:
    from octavo.cache.session import SavedSession
    from octavo.engine.params import SamplingParams
    from octavo.llm import LLM
    from octavo.text import Message

KIND, VERSION = "octavo chat", 1  # what a session file says that it is of


@dataclass(frozen=True)
class LastAnswer:
    """The latest answer in numbers."""

    prompt_tokens: int
    cached_tokens: int | None  # of the prompt, found in the cache; None if the answer was stopped: nobody counted
    answer_tokens: int
    finish_reason: str  # "stop", "length", or "abort" where the reader stopped it


@dataclass(frozen=True)
class Loaded:
    """A saved chat that was taken up, in numbers."""

    model: str  # that it was held with
    tokens: int
    cached_tokens: int  # of them, that need not be computed again
    refused: str | None  # why none is


class Conversation:
    """Messages in, pieces of the answer out."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None):
        self.llm, self.params, self.system = llm, params, system
        self.messages: list[Message] = []
        self.last: LastAnswer | None = None
        self._encode("Hello")  # refuses a model without a chat template before the first message

    def ask(self, text: str) -> Generator[str]:
        """The answer to `text`, piece by piece.

        Who closes the iterator stops the answer: what was said stays in the conversation. A message without any answer,
        because it was stopped too soon or refused, does not.
        """
        prompt = self._encode(text)
        said: list[str] = []
        completion = None
        pieces = self.llm.generate(prompt, self.params, stream=True)
        try:
            for delta in pieces:
                said.append(delta.text)
                completion = delta.completion
                if delta.text:
                    yield delta.text
        except OctavoError as error:
            raise OctavoError(f"{error}; /clear starts a new conversation") from None
        finally:
            pieces.close()  # type: ignore[attr-defined]  # a generator: gives its blocks back now
            answer = "".join(said)
            if completion:
                self.last = LastAnswer(
                    len(prompt), completion.cached_tokens, len(completion.token_ids), completion.finish_reason
                )
            elif answer:
                self.last = LastAnswer(len(prompt), None, len(self.llm.tokenizer(answer)["input_ids"]), "abort")
            if answer or (completion and not completion.error):
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        if completion and completion.error:
            raise OctavoError(completion.error)

    def clear(self) -> None:
        """Forget the messages; the system prompt stays."""
        self.messages, self.last = [], None

    @property
    def capacity(self) -> int:
        """The most tokens a conversation can have."""
        return self.llm.engine.scheduler.max_context

    def footprint(self) -> Footprint:
        """What the latest turn's tokens take in the cache."""
        last = self.last
        # The K and V of an answer's last token are computed only if another token follows.
        return Footprint.of(self.llm, last.prompt_tokens + last.answer_tokens - 1 if last else 0)

    def save(self, path: Path) -> int:
        """Write text and quantized K and V whole or not at all, over nothing but a saved chat. Returns the tokens whose
        K and V were kept."""
        if os.path.exists(path):  # unlike Path.exists, false for a name that is too long
            _read(path)
        content = {
            "kind": KIND,
            "version": VERSION,
            "model": self.llm.model.name,
            "system": self.system,
            "messages": self.messages,
        }
        return self.llm.save(path, self._said() if self.messages else [], about=content)

    def load(self, path: Path) -> Loaded:
        """Take up a saved chat in place of this one: its text, and its K and V where they mean the same here."""
        saved, content = _read(path)
        self.clear()
        self.messages, self.system = content["messages"], content["system"]
        try:
            cached, refused = self.llm.restore(path).cached_tokens, None
        except OctavoError as error:
            cached, refused = 0, str(error)
        return Loaded(content["model"], len(saved.tokens), cached, refused)

    def _said(self) -> list[Message]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.messages]

    def _encode(self, text: str) -> list[int]:
        from octavo.text import encode_chat

        return encode_chat(self.llm.tokenizer, [*self._said(), {"role": "user", "content": text}])


def _read(path: Path) -> tuple[SavedSession, dict[str, Any]]:
    """A saved chat and the content of its text; raises OctavoError with the reason why it is none."""
    from octavo.cache.session import SavedSession

    saved = SavedSession.open(path)
    content = saved.about
    if content.get("kind") != KIND:
        raise OctavoError(f"{path}: a saved session, but not of a chat")
    if content.get("version") != VERSION:
        raise OctavoError(f"{path}: a chat of version {content.get('version')}, and this reads version {VERSION}")
    if not is_text(content.get("model")) or not (content.get("system") is None or is_text(content["system"])):
        raise OctavoError(f"{path}: a chat whose model or system prompt is not text")
    try:
        if content.get("messages") != []:
            read_messages(content.get("messages"))
    except OctavoError as error:
        raise OctavoError(f"{path}: a chat that cannot be read: {error}") from None
    return saved, content
