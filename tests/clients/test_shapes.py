"""Requests of programs that are no libraries, as their sources send them: Open WebUI, LibreChat, aider, Continue."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest

from tests.serve.conftest import Running

ASK = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "How is the weather in Rome?"}]
PART = [{"role": "user", "content": [{"type": "text", "text": "How is the weather in Rome?"}]}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "Open WebUI, a chat": {"stream": True, "messages": ASK, "stream_options": {"include_usage": True}},
    "Open WebUI, a title": {"stream": False, "messages": PART, "max_completion_tokens": 1000},
    "Open WebUI, tools": {"stream": True, "messages": ASK, "tools": [WEATHER], "user": "one"},
    "LibreChat, a chat": {
        "stream": True,
        "messages": ASK,
        "temperature": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "user": "65f0c0ffee",
        "stream_options": {"include_usage": True},
    },
    "LibreChat, a title": {"messages": PART, "temperature": 0.2, "presence_penalty": 0, "max_tokens": 16},
    "aider": {"messages": ASK, "temperature": 0, "stream": True},
    "Continue, a chat": {
        "messages": PART,
        "max_tokens": 4096,
        "stream": True,
        "tools": [WEATHER],
        "parallel_tool_calls": False,
    },
    "Continue, an edit": {"messages": ASK, "max_tokens": 2048, "temperature": 0.01, "stop": ["```"], "stream": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_program_sends_is_answered(served: Running, shape: str):
    body = {"model": served.server.service.name, "max_tokens": 12, **SHAPES[shape]}
    if "max_completion_tokens" in body:
        body |= {"max_completion_tokens": 12}
        del body["max_tokens"]
    body = {
        name: min(value, 12) if name == "max_tokens" else value for name, value in body.items() if value is not None
    }
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"
        return
    *pieces, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    ends = [piece["choices"][0]["finish_reason"] for piece in map(json.loads, pieces) if piece["choices"]]
    assert ends[-1] in ("stop", "length", "tool_calls")
    if body.get("stream_options"):
        assert json.loads(pieces[-1])["usage"]["completion_tokens"] <= 12


def test_what_they_ask_before_a_chat_is_there(served: Running):
    listed = httpx.get(f"{served.url}/v1/models", headers={"Authorization": "Bearer none"}).json()
    assert listed["object"] == "list"
    assert {"id", "object", "created", "owned_by"} <= set(listed["data"][0])
    assert httpx.get(f"{served.url}/health").status_code == 200
