"""What docs/SERVE.md promises of the routes, asked of a server that runs: `python -m tests.clients.promises URL`.

Each check is a request as a client sends it, and what must be true of the answer whatever the model says. A model that
knows tools (Qwen2.5) makes them mean the most; its answers are held, so a model that does not passes them too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import httpx2 as httpx

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather in a city now.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS = [{"type": "function", "function": WEATHER}]
ASK = [{"role": "user", "content": "How is the weather in Rome, and how in Paris?"}]
HI = [{"role": "user", "content": "Say hello."}]
CHECKS: list[Callable[[Server], None]] = []


def check(function: Callable[[Server], None]) -> Callable[[Server], None]:
    CHECKS.append(function)
    return function


class Server:
    """A server, asked by its address."""

    def __init__(self, url: str):
        self.http = httpx.Client(base_url=url, timeout=600)
        self.model = self.http.get("/v1/models").json()["data"][0]["id"]

    def post(self, path: str, status: int = 200, **body: Any) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def chat(self, messages: Any = HI, **more: Any) -> Any:
        return self.post("/v1/chat/completions", **{"messages": messages, "max_tokens": 8, "temperature": 0} | more)

    def events(self, path: str, **body: Any) -> list[Any]:
        answer = self.http.post(path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    called = [one["function"] for one in choice["message"].get("tool_calls") or []]
    return [(one["name"], json.loads(one["arguments"])) for one in called]


@check
def strict_arguments_with_tool_choice_auto(server: Server) -> None:
    choice = server.chat(ASK, tools=TOOLS, max_tokens=120)["choices"][0]
    assert all(name == "weather" and one["city"] in ("Paris", "Rome") for name, one in calls_of(choice))
    assert choice["finish_reason"] in ("tool_calls", "stop", "length")


@check
def several_calls_are_streamed_as_they_are_answered_whole(server: Server) -> None:
    body = {"messages": ASK, "tools": TOOLS, "tool_choice": "required", "max_tokens": 120, "temperature": 0}
    whole = server.post("/v1/chat/completions", **body)["choices"][0]
    calls: list[list[str]] = []
    for event in server.events("/v1/chat/completions", **body):
        for one in event["choices"][0]["delta"].get("tool_calls", []):
            if one["index"] == len(calls):
                calls.append([one["function"]["name"], ""])
            calls[one["index"]][1] += one["function"].get("arguments") or ""
    assert [[one["function"]["name"], one["function"]["arguments"]] for one in whole["message"]["tool_calls"]] == calls


@check
def parallel_tool_calls_false_is_one_call(server: Server) -> None:
    choice = server.chat(ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=60)["choices"][
        0
    ]
    assert len(calls_of(choice)) == 1


@check
def a_closing_tag_within_a_string_is_a_part_of_it(server: Server) -> None:
    said = {"const": 'a </tool_call> b, "c"'}
    parameters = {"type": "object", "properties": {"text": said}, "required": ["text"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "write", "strict": True, "parameters": parameters}}
    for stream in (False, True):
        body = {
            "messages": HI,
            "tools": [tool],
            "tool_choice": "required",
            "max_tokens": 60,
            "parallel_tool_calls": False,
        }
        if not stream:
            assert calls_of(server.chat(**body)["choices"][0]) == [("write", {"text": said["const"]})]
            continue
        deltas = [event["choices"][0]["delta"] for event in server.events("/v1/chat/completions", **body)]
        pieces = [one["function"].get("arguments", "") for delta in deltas for one in delta.get("tool_calls", [])]
        assert json.loads("".join(pieces)) == {"text": said["const"]}


@check
def history_with_results_names_and_null_content(server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    server.chat([
        {"role": "system", "content": [{"type": "text", "text": "Be terse.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "How is it?", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I look."},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny", "name": "weather"},
    ], tools=TOOLS)  # fmt: skip


HARMLESS: dict[str, Any] = {
    "best_of": 1, "top_p": 0, "store": True, "metadata": {"a": "b"}, "user": "x", "service_tier": "auto",
    "prediction": {"type": "content", "content": "x"}, "safety_identifier": "x", "prompt_cache_key": "x",
    "verbosity": "low", "reasoning_effort": "low", "skip_special_tokens": True, "include_stop_str_in_output": True,
    "add_generation_prompt": True, "prompt_logprobs": 1, "return_token_ids": True, "priority": 1, "request_id": "mine",
    "min_p": 0.1, "top_k": 5, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
    "truncate_prompt_tokens": 5, "cache_prompt": True, "repeat_penalty": 1.1, "n_probs": 2,
}  # fmt: skip


@check
def each_field_of_other_servers_is_taken(server: Server) -> None:
    for name, value in HARMLESS.items():
        if name not in ("best_of",):
            server.chat(**{name: value})
    server.post("/v1/completions", prompt="Hello", best_of=1, max_tokens=2)
    assert server.chat(continue_final_message=True, messages=[*HI, {"role": "assistant", "content": "Hel"}])
    assert server.post("/v1/chat/completions", messages=HI, n_predict=3)["usage"]["completion_tokens"] <= 3
    assert server.chat(min_tokens=4, ignore_eos=True, max_tokens=4)["usage"]["completion_tokens"] == 4
    assert server.chat(request_id="mine")["id"] == "chatcmpl-mine"
    told = server.chat(return_token_ids=True, prompt_logprobs=1)
    assert len(told["prompt_logprobs"]) == len(told["prompt_token_ids"]) == told["usage"]["prompt_tokens"]
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    events = server.events("/v1/chat/completions", messages=HI, max_tokens=3, stream_options=options)
    assert all(event["usage"]["prompt_tokens"] > 0 for event in events)


GUIDED: dict[str, tuple[Any, Callable[[str], bool]]] = {
    "guided_json": ({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                     "additionalProperties": False}, lambda said: isinstance(json.loads(said)["a"], bool)),
    "guided_regex": ("[0-9]{3}", lambda said: said.isdigit() and len(said) == 3),
    "guided_choice": (["yes", "no"], lambda said: said in ("yes", "no")),
    "guided_grammar": ('root ::= "x" "y"', lambda said: said == "xy"),
    "structured_outputs": ({"choice": ["up", "down"]}, lambda said: said in ("up", "down")),
    "json_schema": ({"const": 7}, lambda said: said == "7"),
    "grammar": ('root ::= "z"', lambda said: said == "z"),
}  # fmt: skip


@check
def answers_are_held_by_each_name_of_a_constraint(server: Server) -> None:
    for name, (value, holds) in GUIDED.items():
        assert holds(server.chat(max_tokens=40, **{name: value})["choices"][0]["message"]["content"]), name


@check
def error_codes_name_the_fault(server: Server) -> None:
    unknown = server.post("/v1/chat/completions", 400, messages=HI, strange=1)["error"]
    assert (unknown["code"], unknown["param"]) == ("unknown_parameter", "strange")
    empty = server.post("/v1/completions", 400, prompt=["a", ""])["error"]
    assert empty["code"] != "context_length_exceeded"
    long = server.post("/v1/completions", 400, prompt="word " * 200_000)["error"]
    assert long["code"] == "context_length_exceeded"


@check
def top_logprobs_have_a_key_for_each_token(server: Server) -> None:
    body = {"prompt": "Three hearts and a grin: ❤❤❤😀😀😀", "max_tokens": 6, "ignore_eos": True, "logprobs": 20}
    choice = server.post("/v1/completions", temperature=0, **body)["choices"][0]
    told = choice["logprobs"]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(top) in (20, 21)
        assert top[token] == logprob
    if not any(token.startswith("bytes:") for token in told["tokens"]):
        assert "".join(told["tokens"]) == choice["text"]
        assert all(
            choice["text"][at:].startswith(token) for at, token in zip(told["text_offset"], told["tokens"], strict=True)
        )


@check
def a_chat_is_the_same_text_by_every_route(server: Server) -> None:
    chat = server.chat(max_tokens=12)["choices"][0]["message"]["content"]
    response = server.post("/v1/responses", input=HI, max_output_tokens=12, temperature=0, model=server.model)
    (text,) = [part["text"] for item in response["output"] for part in item["content"]]
    message = server.post("/v1/messages", messages=HI, max_tokens=12, temperature=0, model=server.model)
    assert chat == text == "".join(block["text"] for block in message["content"])


@check
def a_response_goes_on_with_the_one_before(server: Server) -> None:
    first = server.post("/v1/responses", input="Remember: blue.", max_output_tokens=4)
    second = server.post("/v1/responses", input="Which?", previous_response_id=first["id"], max_output_tokens=4)
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert server.http.get(f"/v1/responses/{second['id']}").json()["id"] == second["id"]
    gone = server.post("/v1/responses", 400, input="x", previous_response_id="resp_none")["error"]
    assert gone["code"] == "previous_response_not_found"
    form = {"format": {"type": "json_schema", "name": "a", "schema": {"const": 7}}}
    assert server.post("/v1/responses", input="x", text=form)["output"][0]["content"][0]["text"] == "7"


@check
def responses_stream_events_of_calls(server: Server) -> None:
    tools = [{"type": "function", **WEATHER}]
    body = {"input": "Rome?", "tools": tools, "tool_choice": "required", "max_output_tokens": 80, "temperature": 0}
    events = server.events("/v1/responses", **body, parallel_tool_calls=False)
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    done = next(event for event in events if event["type"] == "response.function_call_arguments.done")
    pieces = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(pieces) == done["arguments"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@check
def messages_stream_tools(server: Server) -> None:
    tool = {"name": "weather", "description": "Weather.", "input_schema": WEATHER["parameters"], "strict": True}
    body = {"model": server.model, "messages": ASK, "tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 80}
    events = server.events("/v1/messages", **body)
    begun = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert begun[0]["type"] == "tool_use"
    inputs = [event["delta"]["partial_json"] for event in events
              if event["type"] == "content_block_delta" and event["index"] == 0]  # fmt: skip
    assert json.loads("".join(inputs))["city"] in ("Paris", "Rome")
    assert events[-1]["type"] == "message_stop"
    counted = server.post("/v1/messages/count_tokens", model=server.model, messages=ASK, tools=[tool])
    assert counted["input_tokens"] > 10


@check
def small_routes(server: Server) -> None:
    tokens = server.post("/tokenize", prompt="Hello, world")["tokens"]
    assert server.post("/detokenize", tokens=tokens)["prompt"].endswith("Hello, world")
    for one in server.http.get("/v1/models").json()["data"]:
        model = server.http.get(f"/v1/models/{one['id']}").json()
        assert model["max_model_len"] > 0
        assert server.chat(model=one["id"])["model"] == one["id"]
    for path in ("/version", "/health", "/ping"):
        assert server.http.get(path).status_code == 200
    metrics = server.http.get("/metrics").text
    names = (
        "num_requests_running",
        "num_requests_waiting",
        "time_to_first_token_seconds_bucket",
        "prompt_tokens_total",
    )
    for name in names:
        assert f"vllm:{name}" in metrics


@check
def json_ends_within_its_tokens(server: Server) -> None:
    properties = {"text": {"type": "string"}, "list": {"type": "array", "items": {"type": "string"}, "maxItems": 3}}
    schema = {"type": "object", "properties": properties, "required": ["text", "list"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    story = [{"role": "user", "content": "Write a very long story as JSON."}]
    for most in (24, 40):
        choice = server.chat(story, response_format=form, max_tokens=most)["choices"][0]
        assert set(json.loads(choice["message"]["content"])) == {"text", "list"}
        assert choice["finish_reason"] in ("stop", "length")


def main(url: str) -> int:
    server, failed = Server(url), 0
    for one in CHECKS:
        try:
            one(server)
            print(f"holds  {one.__name__}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILS  {one.__name__}: {type(error).__name__}: {str(error)[:600]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
