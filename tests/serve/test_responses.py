"""`/v1/responses`: OpenAI's newer form says what its older one says, and a conversation can be kept here."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2 as httpx
import pytest

from octavo.completion import Completion
from octavo.serve.calls import CallDelta
from octavo.serve.output.choices import ChoiceDelta, Output
from octavo.serve.requests.responses import ResponsesRequest
from octavo.serve.response_store import InMemory, Kept
from octavo.serve.routes.responses.body import ResponsesBody
from octavo.token_bytes import TokenBytes
from tests.serve.conftest import Running
from tests.serve.test_tools import WEATHER as NESTED
from tests.test_text import FALLBACK

ASK = "Tell me a story."
GREEDY = {"temperature": 0, "max_output_tokens": 12}
WEATHER = {"type": "function", **NESTED["function"]}


def post(running: Running, **fields: Any) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/responses", json={"model": "pamphlet", "input": ASK, **fields}, timeout=60)


def respond(running: Running, **fields: Any) -> dict[str, Any]:
    answer = post(running, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def chat(running: Running, messages: list[Any], **fields: Any) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, **fields}
    return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).json()


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """Numbered events, each of which bears its type twice."""
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def put_together(streamed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a stream is of, from their pieces alone."""
    items: list[dict[str, Any]] = []
    for event in streamed:
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(items)
                items.append(json.loads(json.dumps(event["item"])))
            case "response.content_part.added":
                items[-1]["content"].append(dict(event["part"]))
            case "response.output_text.delta":
                items[event["output_index"]]["content"][0]["text"] += event["delta"]
            case "response.function_call_arguments.delta":
                items[event["output_index"]]["arguments"] += event["delta"]
            case "response.output_item.done":
                items[event["output_index"]]["status"] = event["item"]["status"]
    return items


def test_an_answer_is_that_of_chat_whole_and_streamed(running: Running):
    whole = respond(running, instructions="Be terse.", **GREEDY)
    old = chat(running, [{"role": "system", "content": "Be terse."}, {"role": "user", "content": ASK}])
    assert text_of(whole) == old["choices"][0]["message"]["content"]
    assert (whole["object"], whole["status"]) == ("response", "incomplete")
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["usage"]["input_tokens"] == old["usage"]["prompt_tokens"]
    assert whole["usage"]["output_tokens"] == 12
    streamed = events(post(running, instructions="Be terse.", stream=True, **GREEDY))
    assert [event["type"] for event in streamed[:2]] == ["response.created", "response.in_progress"]
    assert streamed[-1]["type"] == "response.incomplete"
    assert put_together(streamed) == streamed[-1]["response"]["output"]
    assert text_of(streamed[-1]["response"]) == text_of(whole)


def test_a_response_is_gone_on_with_by_its_id(running: Running):
    first = respond(running, instructions="Be terse.", **GREEDY)
    second = respond(running, input="And then?", previous_response_id=first["id"], **GREEDY)
    said = {"role": "assistant", "content": text_of(first)}
    told = [{"role": "user", "content": ASK}, said, {"role": "user", "content": "And then?"}]
    old = chat(running, told)
    assert text_of(second) == old["choices"][0]["message"]["content"], "instructions are not carried on"
    assert second["usage"]["input_tokens"] == old["usage"]["prompt_tokens"]
    assert second["previous_response_id"] == first["id"]
    items = [{"role": "user", "content": ASK}, *first["output"], {"role": "user", "content": "And then?"}]
    assert text_of(respond(running, input=items, **GREEDY)) == text_of(second)

    kept = httpx.get(f"{running.url}/v1/responses/{first['id']}")
    assert kept.json() == first
    assert httpx.delete(f"{running.url}/v1/responses/{first['id']}").json()["deleted"]
    assert httpx.get(f"{running.url}/v1/responses/{first['id']}").status_code == 404
    gone = post(running, previous_response_id=first["id"]).json()["error"]
    assert (gone["param"], gone["code"]) == ("previous_response_id", "previous_response_not_found")
    unkept = respond(running, store=False, **GREEDY)
    assert httpx.get(f"{running.url}/v1/responses/{unkept['id']}").status_code == 404


def test_the_store_keeps_the_latest_within_its_bounds():
    store = InMemory(most=3, room=1000)

    async def add(id: str, text: str) -> None:
        await store.add(Kept({"id": id}, [{"role": "user", "content": text}]))

    async def fill() -> None:
        for i in range(4):
            await add(f"{i}", "a")
            await store.get("1") if i > 0 else None
        assert list(store.kept) == ["2", "3", "1"]
        await add("large", "a" * 700)
        assert "large" in store.kept
        assert store.size == sum(size for _, size in store.kept.values()) <= 1000
        await add("larger", "a" * 2000)
        assert await store.get("larger") is None
        for id in list(store.kept):
            assert await store.remove(id)
        assert store.size == 0

    asyncio.run(fill())


def test_an_answer_matches_a_json_schema(running: Running):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    format = {"type": "json_schema", "name": "number", "schema": schema, "strict": True}
    said = respond(running, text={"format": format}, max_output_tokens=40)
    assert json.loads(text_of(said))["n"] in (1, 2)
    assert said["text"]["format"] == format


def test_log_probabilities_come_with_the_text(running: Running):
    whole = respond(running, top_logprobs=2, **GREEDY)["output"][0]["content"][0]
    assert "".join(one["token"] for one in whole["logprobs"]) == whole["text"]
    assert all(len(one["top_logprobs"]) >= 2 for one in whole["logprobs"])
    streamed = events(post(running, top_logprobs=2, stream=True, **GREEDY))
    assert streamed[-1]["response"]["output"][0]["content"][0]["logprobs"] == whole["logprobs"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_demanded_call_is_made_and_its_result_sent_back(tooled: Running, choice: Any):
    asked: dict[str, Any] = {"tools": [WEATHER], "tool_choice": choice, "temperature": 0, "parallel_tool_calls": False}
    whole = respond(tooled, **asked)
    assert whole["status"] == "completed"
    (call, *_) = whole["output"]
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")
    streamed = events(post(tooled, stream=True, **asked))
    assert put_together(streamed) == streamed[-1]["response"]["output"]
    assert [one["arguments"] for one in put_together(streamed)] == [one["arguments"] for one in whole["output"]]
    result = [{"type": "function_call_output", "call_id": one["call_id"], "output": "Sunny"} for one in whole["output"]]
    by_id = respond(tooled, input=result, previous_response_id=whole["id"], tools=[WEATHER], **GREEDY)
    whole_history = [{"role": "user", "content": ASK}, *whole["output"], *result]
    by_items = respond(tooled, input=whole_history, tools=[WEATHER], **GREEDY)
    assert by_id["usage"]["input_tokens"] == by_items["usage"]["input_tokens"]


def test_items_become_the_messages_that_templates_know():
    def item(type: str, **more: Any) -> dict[str, Any]:
        return {"type": type, **more}

    part = {"type": "output_text", "text": "I look.", "annotations": []}
    items = [
        {"role": "developer", "content": "Be terse."},
        {"role": "user", "content": [{"type": "input_text", "text": "How is it?"}]},
        item("reasoning", id="r", summary=[], content=[{"type": "reasoning_text", "text": "Hm"}]),
        item("message", role="assistant", content=[part], id="m", status="completed"),
        item("function_call", call_id="a", name="weather", arguments='{"city": "Rome"}'),
        item("function_call", call_id="b", name="weather", arguments=""),
        item("function_call_output", call_id="a", output="Sunny"),
        item("function_call_output", call_id="b", output=[{"type": "input_text", "text": "Rain"}]),
    ]
    request = ResponsesRequest(input=items, instructions="Help.")
    (conversation,) = request.generate_request(()).prompts

    def call(id: str, arguments: Any) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}

    assert list(conversation.messages) == [
        {"role": "system", "content": "Help.\n\nBe terse."},
        {"role": "user", "content": "How is it?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm",
            "tool_calls": [call("a", {"city": "Rome"}), call("b", {})],
        },
        {"role": "tool", "tool_call_id": "a", "content": "Sunny"},
        {"role": "tool", "tool_call_id": "b", "content": "Rain"},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "[]"}]}, "input.0.arguments"),
        ({"input": [{"type": "strange"}]}, "input.0"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}}, "text"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(running: Running, fields: Any, param: str):
    refused = post(running, **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_an_item_that_another_follows_is_whole_though_the_answer_is_cut():
    """All pieces come at once, as they do where a client reads slowly."""
    request = ResponsesRequest(input=ASK, tools=[WEATHER], stream=True)
    output = Output(request.generate_request(()), TokenBytes(FALLBACK), "resp_")
    body = ResponsesBody("a", output, request, (), InMemory(most=1, room=1))
    call = CallDelta(0, '{"city"', "call_a", "weather")
    deltas = [ChoiceDelta(0, True, ["I look."], (), ()), ChoiceDelta(0, False, [call], (), (), "length")]
    output.choices[0].reason, output.choices[0].completion = "length", Completion("", [1], "length", 1, 0, [])
    output.choices[0].pieces = ["I look.", call]
    streamed = events(httpx.Response(200, content=b"".join(map(body.events, deltas)) + body.end()))
    done = [event["item"]["status"] for event in streamed if event["type"] == "response.output_item.done"]
    assert done == [item["status"] for item in streamed[-1]["response"]["output"]] == ["completed", "incomplete"]
