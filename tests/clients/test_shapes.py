"""Requests of programs that are no libraries, field by field as their sources build them (read 2026-11-30): Open WebUI
(`routers/openai.py`, `routers/tasks.py`, `utils/payload.py`), LibreChat (`packages/api/src/endpoints/openai/llm.ts`,
sent by LangChain), aider (`models.py`, `coders/chat_chunks.py`, sent by LiteLLM), Continue
(`core/llm/openaiTypeConverters.ts`, `packages/openai-adapters/src/apis/OpenAI.ts`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from octavo.models.model import Model
from tests.serve.conftest import Running, serving, small, with_tools

SYSTEM = {"role": "system", "content": "Be terse."}
ASK = {"role": "user", "content": "How is the weather in Rome?"}
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CACHED = {"type": "text", "text": "Be terse.", "cache_control": {"type": "ephemeral"}}
USAGE = {"include_usage": True}

SHAPES: dict[str, dict[str, Any]] = {
    "Open WebUI, a chat": {"stream": True, "messages": [SYSTEM, ASK], "stream_options": USAGE},
    "Open WebUI, every setting of a chat": {
        "stream": True, "messages": [ASK], "temperature": 0.8, "top_p": 0.9, "min_p": 0.0, "max_tokens": 128,
        "frequency_penalty": 0.1, "presence_penalty": 0.1, "reasoning_effort": "medium", "seed": 0, "stop": ["\n\n"],
        "logit_bias": {"5": -100}, "response_format": {"type": "text"}, "top_k": 40, "repetition_penalty": 1.1,
    },
    "Open WebUI, a title": {"stream": False, "messages": [ASK], "max_completion_tokens": 1000},
    "Open WebUI, after a call": {
        "stream": True, "tools": [TOOL], "messages": [
            ASK, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "index": 0}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
        ],
    },
    "LibreChat, a chat": {
        "stream": True, "messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": ASK["content"]}]}],
        "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "user": "65f0c0ffee",
        "reasoning_effort": "low", "verbosity": "low", "stream_options": USAGE,
    },
    "LibreChat, a title by a function": {
        "stream": False, "messages": [ASK], "temperature": 0.2, "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
    "LibreChat, after a call": {
        "stream": True, "tools": [TOOL], "stream_options": USAGE, "messages": [
            ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "Sunny", "name": "weather", "tool_call_id": "call_1"},
        ],
    },
    "aider": {"stream": True, "messages": [SYSTEM, ASK], "temperature": 0},
    "aider with --cache-prompts": {
        "stream": True, "messages": [{"role": "system", "content": [CACHED]}, ASK], "temperature": 0,
    },
    "aider, its ping that keeps a cache warm": {
        "stream": False, "messages": [{"role": "system", "content": [CACHED]}], "temperature": 0, "max_tokens": 1,
    },
    "Continue, a chat": {
        "stream": True, "messages": [SYSTEM, ASK], "max_tokens": 4096, "tools": [TOOL], "stream_options": USAGE,
    },
    "Continue, after a call": {
        "stream": True, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False, "messages": [
            ASK, {"role": "assistant", "content": " ", "tool_calls": [CALL]},
            {"role": "tool", "content": "Sunny", "tool_call_id": "call_1"},
        ],
    },
    "Continue, an edit": {
        "stream": True, "messages": [ASK], "max_tokens": 2048, "temperature": 0.01, "stop": ["```"],
        "prediction": {"type": "content", "content": "It is sunny."},
    },
}  # fmt: skip
COMPLETION = {  # Continue's, as the user types
    "stream": True, "prompt": "def add(a, b):\n", "max_tokens": 4096, "temperature": 0.01, "top_p": 1,
    "frequency_penalty": 0, "presence_penalty": 0, "stop": ["\n\n", "<|endoftext|>"],
}  # fmt: skip


@pytest.fixture(scope="module")
def running(pamphlet: Model) -> Iterator[Running]:
    """A server whose context, not the request, ends answers early: what is sent is not changed for the test."""
    with serving(small(with_tools(pamphlet), session_len=192)) as running:
        yield running


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_program_sends_is_answered(running: Running, shape: str):
    body = {"model": running.server.service.name, **SHAPES[shape]}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"
        return
    *pieces, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    ends = [piece["choices"][0]["finish_reason"] for piece in map(json.loads, pieces) if piece["choices"]]
    assert ends[-1] in ("stop", "length", "tool_calls")
    if "stream_options" in body:
        assert json.loads(pieces[-1])["usage"]["completion_tokens"] > 0


def test_what_continue_sends_while_one_types_is_answered(running: Running):
    answer = httpx.post(f"{running.url}/v1/completions", json=COMPLETION, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_what_they_ask_before_a_chat_is_there(running: Running):
    listed = httpx.get(f"{running.url}/v1/models", headers={"Authorization": "Bearer none"}).json()
    assert listed["object"] == "list"
    assert {"id", "object", "created", "owned_by", "max_model_len"} <= set(listed["data"][0])
    assert httpx.get(f"{running.url}/health").status_code == 200
