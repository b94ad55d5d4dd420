"""What tells conversations apart before they are tokens: a hash of how they begin.

A chat is known by its messages up to the first of the user's, which are the same in every turn. A prompt is known by
its first block, because what is shorter has no block that could be found again.
"""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from pydantic_core import to_json

FIRST_CHARACTERS, FIRST_TOKENS = 256, 64  # of a prompt: about the first block of the cache
DIGITS, RANDOM = 16, 32  # of a key, and of what follows it in a response's id
RESPONSE = "resp_"


def key_of(body: Any) -> str:
    """The key of a request's body, as JSON has it; empty where nothing tells it from others."""
    if not isinstance(body, dict):
        return ""
    if isinstance(id := body.get("previous_response_id"), str):
        return id.removeprefix(RESPONSE)[:-RANDOM]  # what its first request had
    if isinstance(messages := body.get("messages"), list):
        return _hash([body.get("system"), *_until_user(messages)])
    if isinstance(asked := body.get("input"), list):
        return _hash([body.get("instructions"), *_until_user(asked)])
    if isinstance(asked, str):
        return _hash([body.get("instructions"), asked])
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # of several the first
    least = FIRST_CHARACTERS if isinstance(prompt, str) else FIRST_TOKENS
    return _hash(prompt[:least]) if isinstance(prompt, str | list) and len(prompt) > least else ""


def _until_user(messages: Iterable[Any]) -> list[Any]:
    found = []
    for message in messages:
        found.append(message)
        if isinstance(message, dict) and message.get("role") == "user":
            break
    return found


def _hash(beginning: Any) -> str:
    return blake2b(to_json(beginning), digest_size=DIGITS // 2).hexdigest()
