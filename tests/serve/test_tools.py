"""Calls of tools: the template gets them, the forms models answer in are read, demanded calls are made."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest

from octavo import LLM, OctavoError
from octavo.models.model import Model
from octavo.serve.calls import CallPiece, FreeReader, plain
from octavo.serve.replies import dumps
from octavo.text import encode_chat, takes_tools
from tests.serve.conftest import Running, serving, small

TEMPLATE = """{% if tools %}<|user|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% for c in m.get('tool_calls', []) %}
{{- c.function.name }}({{ c.function.arguments.city }}){% endfor %}<|end|>{% endfor %}<|assistant|>"""
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(pamphlet: Model):
    import copy

    model = copy.copy(pamphlet)
    model.tokenizer = copy.deepcopy(pamphlet.tokenizer)
    model.tokenizer.chat_template = TEMPLATE
    with serving(small(model)) as running:
        yield running


def test_whether_a_template_takes_tools_is_read_from_it(server: Running, pamphlet: Model):
    assert takes_tools(server.llm.tokenizer)
    assert not takes_tools(pamphlet.tokenizer)
    with pytest.raises(OctavoError, match="no place for tools"):
        encode_chat(pamphlet.tokenizer, [{"role": "user", "content": "a"}], [WEATHER])


def chat(server: Running, **fields: Any) -> Any:
    asked = {"messages": [{"role": "user", "content": "How is the weather?"}], "tools": [WEATHER], **fields}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def test_tools_and_calls_reach_the_template(server: Running, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    answer = LLM.answer

    def record(self: LLM, prompt: list[int], *args: Any) -> Any:
        seen.append(self.tokenizer.decode(prompt))
        return answer(self, prompt, *args)

    monkeypatch.setattr(LLM, "answer", record)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "How is it in Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Sunny"},
    ]
    chat(server, messages=messages, max_tokens=1)
    chat(server, messages=messages, max_tokens=1, tool_choice="none")
    assert "The weather in a city." in seen[0]
    assert "weather(Rome)" in seen[0]
    assert "<|tool|>Sunny" in seen[0]
    assert "The weather in a city." not in seen[1]


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_demanded_call_is_made_whole_and_streamed(server: Running, choice: Any):
    for seed in range(2):
        whole = chat(server, tool_choice=choice, seed=seed).json()["choices"][0]
        assert whole["finish_reason"] == "tool_calls"
        assert whole["message"]["content"] is None
        [call] = whole["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
        lines = chat(server, tool_choice=choice, seed=seed, stream=True).text.split("\n\n")
        pieces = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
        streamed = [one for piece in pieces for one in piece["delta"].get("tool_calls", [])]
        assert [one["index"] for one in streamed] == [0] * len(streamed)
        assert streamed[0]["function"]["name"] == "weather"
        assert "".join(one["function"]["arguments"] for one in streamed) == call["function"]["arguments"]
        assert pieces[-1]["finish_reason"] == "tool_calls"


def test_a_call_and_its_result_can_be_sent_back_as_they_came(server: Running):
    client, asked = server.client(), {"model": "pamphlet", "tools": [WEATHER], "seed": 1}
    messages: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    said = client.chat.completions.create(messages=messages, tool_choice="required", **asked).choices[0].message
    messages += [said, {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "Sunny"}]
    assert client.chat.completions.create(messages=messages, max_tokens=2, **asked).usage.completion_tokens <= 2


def function(name: str, key: str, city: list[str]) -> dict[str, Any]:
    """One whose parameters refer to a schema under `key`, and to a part of themselves."""
    properties = {"city": {"$ref": f"#/{key}/City"}, "next": {"$ref": "#/properties/city"}}
    own = {"type": "object", "properties": properties, "required": ["city", "next"], "additionalProperties": False}
    return {"name": name, "parameters": {**own, key: {"City": {"enum": city}}}}


def test_parameters_that_refer_to_definitions_of_their_own_are_kept_apart(server: Running):
    functions = {"rain": function("rain", "$defs", ["Paris"]), "sun": function("sun", "definitions", ["Rome"])}
    tools = [{"type": "function", "function": one} for one in functions.values()]
    for name, city in (("rain", "Paris"), ("sun", "Rome")):
        named = {"type": "function", "function": {"name": name}}
        [call] = chat(server, tools=tools, tool_choice=named, seed=1).json()["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": city, "next": city}
    [call] = chat(server, tools=tools, tool_choice="required", seed=1).json()["choices"][0]["message"]["tool_calls"]
    called = call["function"]
    assert json.loads(called["arguments"])["city"] == {"rain": "Paris", "sun": "Rome"}[called["name"]]


def test_parameters_that_cannot_be_followed_are_the_tools_fault(server: Running):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}
    asked = {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "tool_choice": "required"}
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")


def test_half_a_surrogate_pair_in_a_call_ends_no_reply():
    reader = FreeReader(plain.SYNTAX, ["weather"])
    [call] = reader.push('{"name": "weather", "arguments": {"city": "\\ud83d"}}')
    assert isinstance(call, CallPiece)
    assert json.loads(json.loads(dumps(call.arguments))) == {"city": "?"}
