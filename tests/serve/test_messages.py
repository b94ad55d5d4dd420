"""`/v1/messages`: Anthropic's form of a chat says what OpenAI's says."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest

from octavo.serve.requests.anthropic import MessagesRequest
from tests.serve.conftest import Running

ASK = "Tell me a story."
LONG = [{"role": "user", "content": "word " * 5000}]
GREEDY = {"temperature": 0, "max_tokens": 12}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def post(running: Running, route: str = "messages", **fields: Any) -> httpx.Response:
    body = {"model": "pamphlet", "messages": [{"role": "user", "content": ASK}], **fields}
    return httpx.post(f"{running.url}/v1/{route}", json=body, timeout=60)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """Events, each of which bears its type twice."""
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def put_together(streamed: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream is of."""
    message: dict[str, Any] = {}
    for event in streamed:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta" if event["delta"]["type"] == "text_delta":
                message["content"][event["index"]]["text"] += event["delta"]["text"]
            case "content_block_delta":
                block = message["content"][event["index"]]
                block["json"] = block.get("json", "") + event["delta"]["partial_json"]
            case "content_block_stop":
                block = message["content"][event["index"]]
                if block["type"] == "tool_use":
                    block["input"] = json.loads(block.pop("json"))
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    assert streamed[-1]["type"] == "message_stop"
    return message


def without_id(message: dict[str, Any]) -> dict[str, Any]:
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {**message, "id": "", "content": content, "usage": message["usage"]["output_tokens"]}


def test_an_answer_is_that_of_chat_whole_and_streamed(running: Running):
    whole = post(running, **GREEDY).json()
    chat = post(running, "chat/completions", **GREEDY).json()
    assert whole["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    assert (whole["type"], whole["role"], whole["model"]) == ("message", "assistant", "pamphlet")
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("max_tokens", None)
    usage = whole["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == 12
    assert without_id(put_together(events(post(running, stream=True, **GREEDY)))) == without_id(whole)
    count = post(running, "messages/count_tokens").json()
    assert count == {"input_tokens": chat["usage"]["prompt_tokens"]}


def test_a_stop_sequence_is_named_and_an_answer_s_beginning_may_be_given(running: Running):
    text = post(running, **GREEDY).json()["content"][0]["text"]
    stop = text.split()[3]
    stopped = post(running, stop_sequences=["never", stop], **GREEDY).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    assert stopped["content"][0]["text"] == text[: text.index(stop)]
    start = " ".join(text.split()[:3])
    messages = [{"role": "user", "content": ASK}, {"role": "assistant", "content": start}]
    rest = post(running, messages=messages, **GREEDY).json()["content"][0]["text"]
    assert (start + rest).startswith(text[: len(start) + 8])


def test_an_answer_matches_a_json_schema(running: Running):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    format = {"type": "json_schema", "schema": schema}
    for field in ({"output_config": {"format": format}}, {"output_format": format}):
        said = post(running, max_tokens=40, **field).json()
        assert json.loads(said["content"][0]["text"])["n"] in (1, 2)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_demanded_tool_is_used_and_its_result_sent_back(tooled: Running, choice: dict[str, str]):
    once = {**choice, "disable_parallel_tool_use": True}
    asked: dict[str, Any] = {"tools": [WEATHER], "tool_choice": once, "max_tokens": 300, "temperature": 0}
    whole = post(tooled, **asked).json()
    assert whole["stop_reason"] == "tool_use"
    use = whole["content"][0]
    assert (use["type"], use["name"]) == ("tool_use", "weather")
    assert use["input"]["city"] in ("Paris", "Rome")
    assert without_id(put_together(events(post(tooled, stream=True, **asked)))) == without_id(whole)
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "Sunny"}]}
    messages = [
        {"role": "user", "content": ASK},
        {"role": "assistant", "content": whole["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    assert post(tooled, messages=messages, tools=[WEATHER], max_tokens=3).json()["usage"]["output_tokens"] <= 3


def test_blocks_become_the_messages_that_templates_know():
    def block(type: str, **more: Any) -> dict[str, Any]:
        return {"type": type, **more}

    use = block("tool_use", id="a", name="weather", input={"city": "Rome"})
    asked = [block("text", text="One "), block("text", text="two", cache_control={})]
    said = [block("thinking", thinking="Hm", signature=""), block("text", text="I"), use]
    told = [block("tool_result", tool_use_id="a", content="Sunny"), block("text", text="So?")]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, (asked, said, told), strict=True)]
    request = MessagesRequest(model="m", max_tokens=1, system=[block("text", text="Be terse.")], messages=messages)
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert list(request.conversation().messages) == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "One two"},
        {"role": "assistant", "content": "I", "reasoning_content": "Hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "Sunny"},
        {"role": "user", "content": "So?"},
    ]


@pytest.mark.parametrize(
    ("fields", "status", "kind", "told"),
    [
        ({}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": 1, "model": "other"}, 404, "not_found_error", "no model"),
        ({"max_tokens": 1, "container": "x"}, 400, "invalid_request_error", "container"),
        ({"max_tokens": 1, "tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        (
            {"max_tokens": 1, "messages": LONG},
            400,
            "invalid_request_error",
            "session holds",
        ),
        ({"max_tokens": 1, "stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
    ],
)
def test_a_refusal_has_anthropic_s_form(running: Running, fields: Any, status: int, kind: str, told: str):
    for stream in (False, True):
        refused = post(running, stream=stream, **fields)
        assert refused.status_code == status
        body = refused.json()
        assert (body["type"], body["error"]["type"]) == ("error", kind)
        assert told in body["error"]["message"]
