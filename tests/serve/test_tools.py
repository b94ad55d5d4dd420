"""Calls of tools: the template gets them, the forms models answer in are read, demanded calls are made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest

from octavo import LLM, OctavoError
from octavo.models.model import Model
from octavo.serve.calls import PLAIN, CallDelta, FreeReader
from octavo.serve.output.bodies import dumps
from octavo.serve.prompts import Functions
from octavo.text import encode_chat, takes_tools
from tests.serve.calls.published import FAMILIES
from tests.serve.calls.test_families import called
from tests.serve.conftest import Running, saying

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


@pytest.fixture
def server(tooled: Running) -> Running:
    return tooled


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
    generation = LLM.generation

    def record(self: LLM, prompt: list[int], *args: Any) -> Any:
        seen.append(self.tokenizer.decode(prompt))
        return generation(self, prompt, *args)

    monkeypatch.setattr(LLM, "generation", record)
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
    reader = FreeReader(PLAIN, ["weather"])
    [call] = reader.push('{"name": "weather", "arguments": {"city": "\\ud83d"}}')
    assert isinstance(call, CallDelta)
    assert json.loads(json.loads(dumps(call.arguments))) == {"city": "?"}


STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
ROME = {"name": "weather", "arguments": '{"city": "Rome"}'}


@contextmanager
def template(server: Running, text: str) -> Iterator[None]:
    """Within it the model that is served has another chat template."""
    service, tokenizer = server.server.service, server.llm.tokenizer
    before, functions = tokenizer.chat_template, service.functions
    tokenizer.chat_template = text
    service.functions = Functions(server.llm)
    try:
        yield
    finally:
        tokenizer.chat_template, service.functions = before, functions


def answered(server: Running, said: str, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The choice that comes of what the model wants to say, whole, and its pieces when it is streamed."""
    with saying(server.llm, said):
        whole = chat(server, temperature=0, max_tokens=200, **fields).json()["choices"][0]
    with saying(server.llm, said):
        text = chat(server, temperature=0, max_tokens=200, stream=True, **fields).text
    pieces = [json.loads(line[6:])["choices"][0] for line in text.split("\n\n") if line.startswith("data: {")]
    return whole, pieces


def put_together(pieces: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Text and calls of a stream, as OpenAI's clients put them together."""
    calls: list[dict[str, Any]] = []
    for one in (one for piece in pieces for one in piece["delta"].get("tool_calls", [])):
        if one["index"] == len(calls):
            assert one["type"] == "function"
            calls.append({"id": one["id"], **one["function"]})
        else:
            assert one.keys() == {"index", "function"}
            calls[one["index"]]["arguments"] += one["function"]["arguments"]
    return "".join(piece["delta"].get("content") or "" for piece in pieces), calls


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_read_by_the_templates_family_whole_and_streamed(server: Running, family: str):
    """Through HTTP: a call as the family's own template writes it, and history with a call and its result."""
    call = {"id": "call_1", "type": "function", "function": ROME}
    messages = [
        {"role": "user", "content": "How is it in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
        {"role": "user", "content": "And now?", "name": "Ada"},
    ]
    with template(server, FAMILIES[family]):
        written = called(server.llm.tokenizer, FAMILIES[family], [{"city": "Rome"}])
        whole, pieces = answered(server, written, messages=messages)
        functions = [call["function"] for call in whole["message"]["tool_calls"]]
        assert (whole["finish_reason"], functions, whole["message"]["content"]) == ("tool_calls", [ROME], None)
        text, [streamed] = put_together(pieces)
        assert (text, streamed["arguments"], pieces[-1]["finish_reason"]) == ("", ROME["arguments"], "tool_calls")


@pytest.mark.parametrize("family", ["Hermes", "Llama 3", "Mistral", "InternLM", "FunctionGemma", "plain JSON"])
def test_strict_arguments_are_held_to_their_schema_once_a_call_has_begun(server: Running, family: str):
    """With tool_choice auto: what the model would say of another city, it cannot; text before is its own."""
    with template(server, FAMILIES[family]):
        written = called(server.llm.tokenizer, FAMILIES[family], [{"city": "Oslo"}])
        whole, pieces = answered(server, written, tools=[STRICT, CLOCK])
        arguments = [call["function"]["arguments"] for call in whole["message"]["tool_calls"]]
        assert {json.loads(one).get("city", "Rome") for one in arguments} <= {"Paris", "Rome"}
        assert [call["arguments"] for call in put_together(pieces)[1]] == arguments
        whole, pieces = answered(server, "It is sunny. {x}", tools=[STRICT, CLOCK])
        assert (whole["message"]["content"], whole["finish_reason"]) == ("It is sunny. {x}", "stop")
        assert put_together(pieces) == ("It is sunny. {x}", [])


def test_an_answer_ends_where_a_model_begins_to_write_the_result_of_its_call(server: Running):
    """Gemma's models have a token for it; here a letter stands for it."""
    with template(server, FAMILIES["FunctionGemma"]):
        tokenizer, functions = server.llm.tokenizer, server.server.service.functions
        functions.stops = (tokenizer("~", add_special_tokens=False)["input_ids"][-1],)
        written = called(tokenizer, FAMILIES["FunctionGemma"], [{"city": "Rome"}])
        whole, pieces = answered(server, f"{written}~ Sunny, it says.")
        assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", None)
        assert put_together(pieces)[1][0]["name"] == "weather"


def test_one_answer_holds_several_calls_unless_the_request_forbids_it(server: Running):
    with template(server, FAMILIES["Hermes"]):
        written = called(server.llm.tokenizer, FAMILIES["Hermes"], [{"city": "Rome"}, {"city": "Paris"}], "Wait.")
        for choice in ("auto", "required"):
            whole, pieces = answered(server, written if choice == "auto" else written[6:], tool_choice=choice)
            assert len(whole["message"]["tool_calls"]) == 2
            assert [call["name"] for call in put_together(pieces)[1]] == ["weather", "weather"]
            whole, pieces = answered(server, written, tool_choice=choice, parallel_tool_calls=False)
            assert len(whole["message"]["tool_calls"]) == len(put_together(pieces)[1]) == 1


def test_a_template_whose_form_of_calls_is_unknown_is_told_of(server: Running, caplog: pytest.LogCaptureFixture):
    with template(server, FAMILIES["plain JSON"]):
        assert "form of calls is not known" in caplog.text
    caplog.clear()
    with template(server, FAMILIES["Hermes"]):
        assert "form of calls" not in caplog.text
