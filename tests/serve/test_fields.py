"""Fields of OpenAI's, vLLM's and llama.cpp's requests: they act, or the log says once that they do not; others are
refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI

from octavo import SamplingParams
from octavo.completion import Delta
from octavo.engine.params import MAX_TOKENS
from octavo.engine.params import SamplingParams as Params
from octavo.serve.errors import ApiError
from octavo.serve.fair_queue import FairQueue
from octavo.serve.requests import ChatRequest, CompletionRequest, parsing
from octavo.serve.requests.anthropic import MessagesRequest
from octavo.serve.requests.responses import ResponsesRequest
from octavo.serve.requests.sampling import WITHOUT_EFFECT
from octavo.serve.worker import Job
from tests.serve.conftest import Running

HELLO: Any = [{"role": "user", "content": "Tell me a story about a dog."}]
STORY = "Once upon a time, there was a"


def post(running: Running, route: str = "chat/completions", **fields: Any) -> httpx.Response:
    base: dict[str, Any] = {"messages": HELLO} if route.startswith("chat") else {"prompt": STORY}
    return httpx.post(f"{running.url}/v1/{route}", json=base | {"temperature": 0, "max_tokens": 4} | fields, timeout=60)


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


HARMLESS: dict[str, Any] = {
    "user": "me",
    "safety_identifier": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "prediction": {"type": "content", "content": "a"},
    "verbosity": "low",
    "prompt_cache_key": "a",
    "prompt_cache_retention": "24h",
    "cache_prompt": True,
    "guided_decoding_backend": "auto",
    "guided_whitespace_pattern": " ?",
    "spaces_between_special_tokens": True,
}


def test_fields_without_effect_are_taken_and_told_of_once(running: Running, caplog: pytest.LogCaptureFixture):
    parsing.told.clear()
    plain = said(post(running))
    content = [{"type": "text", "text": HELLO[0]["content"], "cache_control": {"type": "ephemeral"}}]
    nested = {"messages": [{"role": "user", "content": content}]}
    streams = {"include_obfuscation": True, "include_usage": True}
    with caplog.at_level(logging.WARNING, "octavo"):
        for _ in range(2):
            assert said(post(running, **HARMLESS, **nested)) == plain
            assert post(running, stream=True, stream_options=streams).status_code == 200
    lines = [record.message for record in caplog.records if "has no effect" in record.message]
    named = {name for name in WITHOUT_EFFECT if any(f"the field {name} " in line for line in lines)}
    assert named == set(WITHOUT_EFFECT)
    assert len(lines) == len(named)


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1},
        {"logprobs": None, "tools": None, "stop": None, "seed": None, "logit_bias": None},
        {"modalities": ["text"]},
        {"reasoning_effort": "low"},
        {"messages": [*HELLO, {"role": "assistant", "content": None}, *HELLO]},
        {"messages": [*HELLO, {"role": "assistant", "content": "a", "reasoning_content": "b"}, *HELLO]},
        {"messages": [{**HELLO[0], "name": "Ada"}]},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_that_clients_send_are_taken(running: Running, fields: dict[str, Any]):
    assert post(running, **fields).status_code == 200


def test_a_share_of_nothing_is_greedy(running: Running):
    assert said(post(running, top_p=0, temperature=2)) == said(post(running))
    assert SamplingParams(top_p=0, temperature=2) == Params(temperature=0)


def test_other_servers_names_act_as_ours(running: Running):
    whole = said(post(running, "completions", max_tokens=9))
    assert said(post(running, "completions", max_tokens=None, n_predict=9)) == whole
    long = said(post(running, "completions", max_tokens=60))
    ours = said(post(running, "completions", max_tokens=60, repetition_penalty=5))
    assert said(post(running, "completions", max_tokens=60, repeat_penalty=5)) == ours != long
    choice = post(running, n_probs=3).json()["choices"][0]
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 3
    refused = post(running, "completions", n_predict=5).json()["error"]
    assert "another name" in refused["message"]
    assert post(running, max_tokens=None, n_predict=0).status_code == 400
    for endless in (CompletionRequest(prompt="a", n_predict=-1), ChatRequest(messages=HELLO, n_predict=-1)):
        assert endless.generate_request().sampling["max_tokens"] == MAX_TOKENS


SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
OBJECT = {**SCHEMA, "additionalProperties": False}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_json": OBJECT}, {'{"a": 1}', '{"a": 2}'}),
        ({"guided_json": json.dumps(OBJECT)}, {'{"a": 1}', '{"a": 2}'}),
        ({"json_schema": OBJECT}, {'{"a": 1}', '{"a": 2}'}),
        ({"structured_outputs": {"json": OBJECT}}, {'{"a": 1}', '{"a": 2}'}),
        ({"guided_regex": "(ab){2}c?"}, {"abab", "ababc"}),
        ({"structured_outputs": {"regex": "(ab){2}c?"}}, {"abab", "ababc"}),
        ({"guided_choice": ["yes", "no way"]}, {"yes", "no way"}),
        ({"structured_outputs": {"choice": ["yes", "no way"]}}, {"yes", "no way"}),
        ({"guided_grammar": 'start: "x" | "yy"'}, {"x", "yy"}),
        ({"grammar": 'root ::= "x" | "yy"'}, {"x", "yy"}),
        ({"structured_outputs": {"grammar": 'start: "x" | "yy"'}}, {"x", "yy"}),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_answers_match_what_other_servers_call_guided(running: Running, fields: dict[str, Any], expected: set[str]):
    for route in ("chat/completions", "completions"):
        assert said(post(running, route, max_tokens=40, **fields)) in expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {"type": "x"}}, "guided_json"),
        ({"guided_json": "no JSON"}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": "a{5000}"}, "guided_regex"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"guided_grammar": 'start: "a"{90000}'}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"best_of": 3}, "best_of"),
        ({"request_id": "a b"}, "request_id"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_served_is_refused_by_the_requests_own_name(running: Running, fields: Any, param: str):
    answer = post(running, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": ""}, "invalid_value"),
        ({"prompt": [STORY, ""]}, "empty_prompt"),
        ({"prompt": "word " * 600}, "context_length_exceeded"),
        ({"prompt": None}, "invalid_type"),
        ({"nonsense": 1}, "unknown_parameter"),
        ({"temperature": "hot"}, "invalid_type"),
        ({"temperature": -1}, "invalid_value"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_codes_name_the_fault(running: Running, fields: dict[str, Any], code: str):
    assert post(running, "completions", **fields).json()["error"]["code"] == code


def test_unknown_fields_are_left_out_where_the_server_is_told_to(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    parsing.told.clear()
    messages, options = [{**HELLO[0], "mood": "good"}], {"shape": 1}
    unknown: dict[str, Any] = {"messages": messages, "frobnicate": 1, "stream_options": options, "stream": True}
    refused = post(running, **unknown)
    assert refused.status_code == 400
    monkeypatch.setattr(running.server.service, "ignore_unknown", True)
    with caplog.at_level(logging.WARNING, "octavo"):
        assert post(running, **unknown).status_code == 200
    assert {"mood", "frobnicate", "shape"} <= {record.message.split()[2] for record in caplog.records}
    assert post(running, temperature="hot").status_code == 400


MOOD: Any = {"mood": 1}
TEXT: Any = {"type": "text", "text": "a", **MOOD}
USE: Any = {"type": "tool_use", "id": "a", "name": "b", "input": {}, **MOOD}
RESULT: Any = {"type": "tool_result", "tool_use_id": "a", "content": [TEXT], **MOOD}


@pytest.mark.parametrize(
    ("kind", "messages", "named"),
    [
        (MessagesRequest, [{"role": "user", "content": [TEXT]}], "messages.0.content.0.mood"),
        (MessagesRequest, [{"role": "assistant", "content": [USE]}], "messages.0.content.0.mood"),
        (MessagesRequest, [{"role": "user", "content": [RESULT]}], "messages.0.content.0.content.0.mood"),
        (MessagesRequest, [{"role": "user", "content": "a", "mood[": 1}], "messages.0.mood["),
        (ResponsesRequest, [{"role": "user", "content": "a", **MOOD}], "input.0.mood"),
        (ChatRequest, [{"role": "user", "content": [TEXT]}], "messages.0.content.0.mood"),
    ],
    ids=["text", "tool use", "tool result", "brackets", "item", "chat"],
)
def test_unknown_fields_within_parts_are_named_and_left_out(kind: Any, messages: Any, named: str):
    """Though a part may be one of several kinds, whose name pydantic puts into the path."""
    more: dict[str, Any] = {"model": "m", "max_tokens": 1} if kind is MessagesRequest else {}
    body = json.dumps({named.partition(".")[0]: messages, **more}).encode()
    with pytest.raises(ApiError) as refused:
        parsing.parse(body, kind, 100)
    assert (refused.value.param, refused.value.code) == (named, "unknown_parameter")
    assert "mood" not in parsing.parse(body, kind, 100, ignore_unknown=True).model_dump_json()


def test_an_answer_can_go_on_with_the_last_message(running: Running):
    whole = said(post(running, max_tokens=12))
    begun = [*HELLO, {"role": "assistant", "content": said(post(running, max_tokens=4))}]
    rest = said(post(running, messages=begun, max_tokens=8, continue_final_message=True))
    assert begun[-1]["content"] + rest == whole
    ids = post(running, add_generation_prompt=False, return_token_ids=True).json()["prompt_token_ids"]
    assert post(running, return_token_ids=True).json()["prompt_token_ids"][: len(ids)] == ids


def test_a_prompt_can_be_cut_and_token_ids_be_told(running: Running, client: OpenAI):
    whole = post(running, "completions", return_token_ids=True).json()
    ids = running.llm.tokenizer(STORY)["input_ids"]
    assert whole["prompt_token_ids"] == ids
    assert running.llm.tokenizer.decode(whole["choices"][0]["token_ids"]) == whole["choices"][0]["text"]
    cut = post(running, "completions", return_token_ids=True, truncate_prompt_tokens=3).json()
    assert cut["prompt_token_ids"] == ids[-3:]
    assert post(running, "completions", prompt="word " * 6000, truncate_prompt_tokens=-1).status_code == 200
    asked: Any = {"model": "pamphlet", "prompt": STORY, "max_tokens": 4, "temperature": 0, "stream": True}
    pieces = list(client.completions.create(**asked, extra_body={"return_token_ids": True}))
    assert pieces[0].prompt_token_ids == ids
    assert [id for piece in pieces for id in piece.choices[0].token_ids] == whole["choices"][0]["token_ids"]


def test_a_request_may_name_itself_and_a_stream_may_count_as_it_goes(running: Running, client: OpenAI):
    assert post(running, request_id="abc-1").json()["id"] == "chatcmpl-abc-1"
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked: Any = {"model": "pamphlet", "messages": HELLO, "max_tokens": 6, "temperature": 0, "stream": True}
    *pieces, last = client.chat.completions.create(**asked, stream_options=options)
    counts = [piece.usage.completion_tokens for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == last.usage.completion_tokens == 6
    assert {piece.usage.prompt_tokens for piece in pieces} == {last.usage.prompt_tokens}


def test_a_piece_counts_what_was_told_by_then_though_all_come_at_once(client: OpenAI, monkeypatch: pytest.MonkeyPatch):
    batches = Job.batches

    async def at_once(job: Job) -> AsyncIterator[list[Delta]]:
        yield [delta async for deltas in batches(job) for delta in deltas]

    monkeypatch.setattr(Job, "batches", at_once)
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked: Any = {"model": "pamphlet", "messages": HELLO, "max_tokens": 6, "temperature": 0, "stream": True}
    *pieces, last = client.chat.completions.create(**asked, stream_options=options)
    counts = [piece.usage.completion_tokens for piece in pieces]
    assert counts[0] < counts[-1] == last.usage.completion_tokens == 6


def test_of_one_clients_requests_the_lowest_priority_number_is_next():
    queue, order = FairQueue(1), list[str]()
    first = queue.ask("a", lambda: order.append("first"))
    tickets = [queue.ask("a", lambda name=name: order.append(name), p) for name, p in (("b", 0), ("c", 5), ("d", -1))]
    first.leave()
    for _ in range(3):
        next(ticket for ticket in tickets if ticket.begun and not ticket.over).leave()
    assert order == ["first", "d", "b", "c"]
