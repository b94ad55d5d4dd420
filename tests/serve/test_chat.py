"""`/v1/chat/completions` as the real client sees it."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from octavo import SamplingParams
from tests.serve.conftest import Running

HELLO: Any = [{"role": "user", "content": "Tell me a story about a dog."}]
GREEDY: Any = {"model": "pamphlet", "temperature": 0}


def test_an_answer_is_that_of_the_python_face(running: Running, client: OpenAI):
    answer = client.chat.completions.create(messages=HELLO, max_tokens=20, **GREEDY)
    own = running.llm.chat(HELLO, SamplingParams(max_tokens=20))
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == own.text
    assert answer.choices[0].finish_reason == own.finish_reason == "length"
    assert answer.usage.prompt_tokens == own.prompt_tokens
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == own.prompt_tokens + 20


def test_a_stream_is_the_whole_answer_in_pieces_and_ends_with_its_usage(client: OpenAI):
    whole = client.chat.completions.create(messages=HELLO, max_completion_tokens=30, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=HELLO, max_completion_tokens=30, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    *pieces, last = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    assert len(pieces) > 10
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in pieces)
    assert (last.choices, last.usage.completion_tokens) == ([], 30)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: OpenAI):
    free = client.chat.completions.create(messages=HELLO, max_tokens=40, **GREEDY).choices[0].message.content
    stop = free[20:26]
    choice = client.chat.completions.create(messages=HELLO, max_tokens=40, stop=[stop], **GREEDY).choices[0]
    assert (choice.message.content, choice.finish_reason) == (free[: free.index(stop)], "stop")


def test_a_model_that_ends_its_answer_finishes_with_stop(client: OpenAI):
    choice = client.chat.completions.create(messages=HELLO, **GREEDY).choices[0]
    assert choice.finish_reason == "stop", "without max_tokens an answer goes on to its own end"
    assert "<|end|>" not in choice.message.content


def test_a_seed_gives_the_same_answer_again_and_n_answers_that_differ(client: OpenAI):
    asked: Any = {"model": "pamphlet", "messages": HELLO, "seed": 7, "temperature": 1.5, "max_tokens": 12, "n": 3}
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    alone = client.chat.completions.create(**asked | {"n": 1})
    assert alone.choices[0].message.content == texts[0]


def test_the_answers_to_one_prompt_share_its_blocks(running: Running, client: OpenAI):
    running.llm.engine.pool.clear()
    long: Any = [{"role": "user", "content": "The dog ran after the ball. " * 40}]
    answer = client.chat.completions.create(messages=long, max_tokens=3, n=4, **GREEDY)
    prompt = answer.usage.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.completion_tokens == 12
    block = running.llm.cache.layout.block_size
    counts = running.server.service.worker.counts
    before = counts.hit_tokens
    again = client.chat.completions.create(messages=long, max_tokens=3, **GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens == (prompt - 1) // block * block
    assert counts.hit_tokens - before == (prompt - 1) // block * block
    running.llm.engine.pool.clear()
    before = counts.hit_tokens
    client.chat.completions.create(messages=long, max_tokens=3, n=4, **GREEDY)
    assert counts.hit_tokens - before == 3 * ((prompt - 1) // block * block), "each but the first found the prompt"


def test_log_probabilities_of_every_token_and_of_its_rivals(client: OpenAI):
    asked: Any = {"messages": HELLO, "max_tokens": 6, "logprobs": True, "top_logprobs": 3, **GREEDY}
    choice = client.chat.completions.create(**asked).choices[0]
    content = choice.logprobs.content
    assert "".join(one.token for one in content) == choice.message.content
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob <= 0
        assert bytes(one.bytes).decode() == one.token
    streamed = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]
    assert [one.token for c in streamed for one in c.logprobs.content] == [one.token for one in content]


def test_a_bias_forbids_or_demands_a_token_and_penalties_forbid_repetition(running: Running, client: OpenAI):
    [token] = running.llm.tokenizer(" dog")["input_ids"]
    asked: Any = {"messages": HELLO, "max_tokens": 8, **GREEDY}
    demanded = client.chat.completions.create(logit_bias={str(token): 100}, **asked)
    assert demanded.choices[0].message.content == " dog" * 8
    both = client.chat.completions.create(logit_bias={str(token): 100}, frequency_penalty=2, **asked)
    assert both.choices[0].message.content == " dog" * 8, "eight times 2 is less than 100"
    free = client.chat.completions.create(**asked).choices[0].message.content
    first = running.llm.tokenizer(free)["input_ids"][0]
    forbidden = client.chat.completions.create(logit_bias={str(first): -100}, **asked).choices[0].message.content
    assert not forbidden.startswith(running.llm.tokenizer.decode([first]))


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}, "age": {"type": "integer", "minimum": 0, "maximum": 20}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_matched_and_the_answer_ends_with_it(client: OpenAI, stream: bool):
    form: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        asked: Any = {"model": "pamphlet", "messages": HELLO, "seed": seed, "response_format": form, "stream": stream}
        answer = client.chat.completions.create(**asked, extra_body={"top_k": 50})
        if stream:
            pieces = [chunk.choices[0] for chunk in answer]
            text, reason = "".join(piece.delta.content or "" for piece in pieces), pieces[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        value = json.loads(text)
        assert value["kind"] in ("dog", "cat")
        assert 0 <= value["age"] <= 20
        assert reason == "stop"


def test_a_json_object_is_one(client: OpenAI):
    choice = client.chat.completions.create(
        messages=HELLO, model="pamphlet", seed=3, temperature=2, response_format={"type": "json_object"}, max_tokens=60
    ).choices[0]
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_parts_of_text_are_one_text_and_developer_is_system(client: OpenAI):
    texts = [{"type": "text", "text": text} for text in ("Tell me a story ", "about a dog.")]
    parts: Any = [{"role": "user", "content": texts}]
    answers = [client.chat.completions.create(messages=m, max_tokens=8, **GREEDY) for m in (HELLO, parts)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_what_describes_the_caller_is_accepted_and_changes_nothing(client: OpenAI):
    plain = client.chat.completions.create(messages=HELLO, max_tokens=5, **GREEDY)
    told = client.chat.completions.create(messages=HELLO, max_tokens=5, user="me", metadata={"a": "b"}, **GREEDY)
    assert told.choices[0].message == plain.choices[0].message


def test_the_models_are_one(client: OpenAI):
    assert [model.id for model in client.models.list()] == ["pamphlet"]
    assert client.models.retrieve("pamphlet").id == "pamphlet"
    with pytest.raises(NotFoundError, match="this server has pamphlet"):
        client.models.retrieve("another")
    with pytest.raises(NotFoundError):
        client.chat.completions.create(messages=HELLO, model="another")


TOOL = {"type": "function", "function": {"name": "f"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"functions": []}, "functions"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"best_of": 2}, "best_of"),
    ({"n": 0}, "n"),
    ({"n": 1.5}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop.0"),
    ({"stop": "a" * 1025}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"4096": 1}}, "token 4096"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a", "nam": "me"}]}, "messages.0.nam"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}}, "schema"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, "messages.0.refusal"),
    ({"tools": [TOOL]}, "no place for tools"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=[f"{next(iter(f))}-{n}" for f, n in REFUSED])
def test_what_is_not_served_is_refused_by_name(client: OpenAI, fields: dict[str, Any], named: str):
    asked = {"messages": HELLO, **fields}
    with pytest.raises(BadRequestError) as refusal:
        client.post("/chat/completions", body=asked, cast_to=object)
    error = refusal.value.body
    assert error["type"] == "invalid_request_error"
    assert error["param"] == named or named in error["message"]
    assert "story" not in error["message"], "an error quotes no prompt"


def test_a_prompt_that_can_never_fit_is_refused_with_the_code_clients_know(client: OpenAI):
    with pytest.raises(BadRequestError) as refusal:
        client.chat.completions.create(messages=[{"role": "user", "content": "word " * 600}], **GREEDY)
    assert refusal.value.code == "context_length_exceeded"


def of_schema(schema: str) -> str:
    return f'"response_format": {{"type": "json_schema", "json_schema": {{"name": "a", "schema": {schema}}}}}'


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"logit_bias": {"4096": 1}', "logit_bias"),
        ('"stop_token_ids": [4096]', "stop_token_ids"),
        ('"ignore_eos": true, ' + of_schema("{}"), "response_format"),
        (of_schema('{"type": "x"}'), "response_format"),
        (of_schema('{"const": NaN}'), "response_format"),
        (of_schema('{"maximum": 1e999}'), "response_format"),
    ],
)
def test_what_only_the_model_can_refuse_is_refused_by_name_too(running: Running, field: str, param: str):
    content = f'{{"messages": [{{"role": "user", "content": "a"}}], {field}}}'
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{running.url}/v1/chat/completions", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI):
    said = client.chat.completions.create(messages=HELLO, max_tokens=5, **GREEDY).choices[0].message
    openais = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None}
    messages: Any = [*HELLO, said, {"role": "user", "content": "And then?"}, openais, *HELLO]
    assert client.chat.completions.create(messages=messages, max_tokens=2, **GREEDY).usage.completion_tokens == 2
