"""A conversation with a model: the messages so far, the next answer in pieces, a file to keep it in.

It knows no terminal (see chat.py). The whole conversation is sent with every message; what the cache still holds of it
is found there block by block and not computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.footprint import Footprint
from octavo.errors import OctavoError
from octavo.text import check_messages, is_text

if TYPE_CHECKING:
    from octavo.engine.sampling import SamplingParams
    from octavo.llm import LLM
    from octavo.text import Message

KIND, VERSION = "octavo chat", 1  # what a saved file says it is


@dataclass(frozen=True)
class Turn:
    """The latest answer in numbers."""

    prompt_tokens: int
    cached_tokens: int | None  # of the prompt, found in the cache; None if the answer was stopped: nobody counted
    answer_tokens: int
    finish_reason: str  # "stop", "length", or "abort" where the reader stopped it


class Conversation:
    """Messages in, pieces of the answer out."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None):
        self.llm, self.params, self.system = llm, params, system
        self.messages: list[Message] = []
        self.turn: Turn | None = None
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
                self.turn = Turn(
                    len(prompt), completion.cached_tokens, len(completion.tokens), completion.finish_reason
                )
            elif answer:
                self.turn = Turn(len(prompt), None, len(self.llm.tokenizer(answer)["input_ids"]), "abort")
            if completion or answer:
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def clear(self) -> None:
        """Forget the messages; the system prompt stays."""
        self.messages, self.turn = [], None

    @property
    def capacity(self) -> int:
        """The most tokens a conversation can have."""
        return self.llm.engine.scheduler.max_context

    def footprint(self) -> Footprint:
        """What the latest turn's tokens take in the cache."""
        turn = self.turn
        # The K and V of an answer's last token are computed only if another token follows.
        return Footprint.of(self.llm, turn.prompt_tokens + turn.answer_tokens - 1 if turn else 0)

    def save(self, path: Path) -> None:
        """Write the conversation whole or not at all, over nothing but a saved conversation."""
        content = {
            "kind": KIND,
            "version": VERSION,
            "model": self.llm.model.name,
            "kv": str(self.llm.format),
            "system": self.system,
            "messages": self.messages,
        }
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            if path.exists():
                _read(path)
            with part.open("w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise OctavoError(f"{path} cannot be written: {error.strerror}") from None
        finally:
            with suppress(OSError):
                part.unlink()

    def load(self, path: Path) -> dict[str, Any]:
        """Take up a saved conversation in place of this one; returns the file's content."""
        content = _read(path)
        self.clear()
        self.messages, self.system = content["messages"], content["system"]
        return content

    def _encode(self, text: str) -> list[int]:
        from octavo.text import encode_chat

        first = [{"role": "system", "content": self.system}] if self.system else []
        return encode_chat(self.llm.tokenizer, [*first, *self.messages, {"role": "user", "content": text}])


def _read(path: Path) -> dict[str, Any]:
    """The content of a saved conversation; raises OctavoError with the reason why it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OctavoError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise OctavoError(f"{path} is not a saved chat: it is not JSON") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise OctavoError(f"{path} is not a saved chat: it does not say that it is one")
    if content.get("version") != VERSION:
        raise OctavoError(f"{path} is a chat of version {content.get('version')}, and this reads version {VERSION}")
    system, messages = content.get("system"), content.get("messages")
    try:
        roles = [message["role"] for message in check_messages(messages)] if messages != [] else []
    except OctavoError as error:
        raise OctavoError(f"{path} is damaged: {error}") from None
    if system is not None and not is_text(system):
        raise OctavoError(f"{path} is damaged: its system prompt is not text")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise OctavoError(f"{path} is damaged: its messages do not alternate between user and assistant")
    return content
