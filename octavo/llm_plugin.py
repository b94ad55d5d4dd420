"""Octavo in Simon Willison's `llm`: `llm -m octavo/DIR "…"`, and `llm chat -m octavo/DIR`.

`llm` asks its plug-ins for all models there are. Any directory and Hub id may be one of ours, so those are named that
the command line mentions, that `llm` has as its default model, or that were used before: `llm -c` goes on with these.
Nothing heavy is imported until a prompt is answered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import llm
from pydantic import Field

from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.llm import LLM

PREFIX = "octavo/"
KV = "kv8"
USED = "octavo-models.json"  # in llm's own directory


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    mentioned = [word[word.find(PREFIX) :] for word in sys.argv if PREFIX in word and _is_option(word)]
    for name in dict.fromkeys([f"{PREFIX}pamphlet", *mentioned, *_used(), llm.get_default_model()]):
        if name.startswith(PREFIX) and len(name) > len(PREFIX):
            register(OctavoModel(name))


class OctavoModel(llm.Model):
    """A directory, a Hub id, or `pamphlet`."""

    can_stream = True

    class Options(llm.Options):
        """`-o name value`"""

        kv: str | None = Field(default=None, description=f"The KV cache's format: kv8, k8v4, kv4, int8, … [{KV}]")
        max_tokens: int | None = Field(default=None, description="Most tokens of an answer")
        temperature: float | None = Field(default=None, description="0 takes the most likely token")
        top_p: float | None = Field(default=None, description="Share of the probability that is drawn from")
        seed: int | None = Field(default=None, description="The same one draws the same answer")

    def __init__(self, name: str):
        self.model_id = name

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,  # noqa: ARG002
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        from octavo import SamplingParams

        options = prompt.options.model_dump(exclude_none=True)
        try:
            engine = _engine(self.model_id.removeprefix(PREFIX), options.pop("kv", KV))
            params = SamplingParams(**({"max_tokens": 1024} | options))
            pieces = engine.chat(_messages(prompt, conversation), params, stream=True)
            whole = [piece.text for piece in pieces] if not stream else None
            _remember(self.model_id)
            yield from whole if whole is not None else (piece.text for piece in pieces)
        except OctavoError as error:
            raise llm.ModelError(str(error)) from None

    def __str__(self) -> str:
        return f"Octavo: {self.model_id}"


@cache
def _engine(name: str, kv: str) -> LLM:
    """Loaded once for all prompts of a chat."""
    from octavo import LLM, cores

    cores.use()
    return LLM(name, kv, max_batch_size=1)


def _messages(prompt: llm.Prompt, conversation: llm.Conversation | None) -> list[dict[str, Any]]:
    """The conversation in the roles of chat templates."""
    said: list[dict[str, Any]] = []
    for before in conversation.responses if conversation is not None else []:
        said += [
            {"role": "user", "content": before.prompt.prompt},
            {"role": "assistant", "content": before.text_or_raise()},
        ]
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, *said, {"role": "user", "content": prompt.prompt}]


def _is_option(word: str) -> bool:
    """octavo/DIR, -moctavo/DIR, --model=octavo/DIR: not a prompt that has the word in it."""
    return word[: word.find(PREFIX)] in ("", "-m", "--model=")


def _used() -> list[str]:
    try:
        found = json.loads((llm.user_dir() / USED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _remember(name: str) -> None:
    if name not in (used := _used()):
        (llm.user_dir() / USED).write_text(json.dumps([*used, name]), encoding="utf-8")
