"""A request as a line of JSON, and its answer as another: what `octavo generate` reads and writes, wherever it runs."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from octavo.completion import Completion
from octavo.engine.params import SamplingParams, allowed
from octavo.errors import OctavoError
from octavo.inputs import read_messages, read_prompt
from octavo.text import encode_chat, token_text

if TYPE_CHECKING:
    from octavo.llm import LLM


def own_id(text: bytes, otherwise: Any) -> Any:
    """The id that a line gives itself, be the rest right or wrong."""
    with suppress(OctavoError):
        value = _read(text)
        return value.get("id", otherwise) if isinstance(value, dict) else otherwise
    return otherwise


def fields(text: bytes) -> dict[str, Any]:
    """What a line asks for; raises OctavoError for what is no JSON object of known fields."""
    return checked(_read(text))


def _read(text: bytes) -> Any:
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except UnicodeDecodeError:
        raise OctavoError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise OctavoError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise OctavoError("not JSON that can be read: nested too deep") from None
    except ValueError as error:  # NaN, an integer of too many digits
        raise OctavoError(f"not JSON that can be read: {error}") from None


def checked(value: Any) -> dict[str, Any]:
    """The fields of a request, if there are no others; raises OctavoError."""
    if not isinstance(value, dict):
        raise OctavoError('not a JSON object: a line is like {"prompt": "…"}')
    known = ["id", "prompt", "messages", *allowed("JSON lines")]
    if strange := sorted(value.keys() - set(known)):
        raise OctavoError(f"unknown field {strange[0]!r}; the fields are {', '.join(known)}")
    return value


def _finite(text: str) -> float:
    """A number of JSON, which has no NaN and no infinity."""
    if not isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def parse(asked: dict[str, Any], llm: LLM, defaults: SamplingParams, chat: bool) -> tuple[list[int], SamplingParams]:
    """The prompt's tokens and the sampling parameters that `fields` ask for; raises OctavoError for what cannot be
    served."""
    asked = {name: value for name, value in asked.items() if name != "id"}
    if ("prompt" in asked) == ("messages" in asked):
        raise OctavoError("a line holds either a prompt or messages")
    if "messages" in asked:
        messages = read_messages(asked.pop("messages"))
    else:
        prompt = read_prompt(asked.pop("prompt"))
        messages = [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else []
    params = replace(defaults, **{name: value for name, value in asked.items() if value is not None})
    sequence = llm.sequence(encode_chat(llm.tokenizer, messages) if messages else prompt, params)
    llm.engine.scheduler.expect_room(sequence)
    return sequence.tokens, params


def answer(llm: LLM, completion: Completion) -> dict[str, Any]:
    """A completion as JSON."""

    def named(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": token, "text": token_text(llm.tokenizer, token), "logprob": logprob}

    said = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "cached_tokens": completion.cached_tokens,
    }
    if any(one.logprob is not None for one in completion.sampled):
        said["logprobs"] = [
            {**named(one.token, one.logprob), "top": [named(*other) for other in one.top.items()]}
            for one in completion.sampled
        ]
    return said
