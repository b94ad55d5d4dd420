"""Requests that mean harm cost others nothing: each is refused early, in the words of a limit."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
import torch
from openai import AuthenticationError

from octavo.errors import OctavoError
from octavo.grammars.size import MAX_REPETITIONS, measure_schema, regex_size
from octavo.models.model import Model
from octavo.serve import logs
from octavo.serve.connections import Connections
from octavo.serve.errors import ApiError
from octavo.serve.fair_queue import FairQueue, Ticket
from octavo.serve.limits import Limits
from octavo.serve.listening import bind
from octavo.serve.requests import ChatRequest, CompletionRequest, parse
from octavo.serve.requests.body import MAX_KEYS, check_json
from octavo.serve.response_store import InMemory, Kept
from octavo.serve.server import Server
from tests.conftest import wait_until
from tests.serve.conftest import Running, serving, small

HELLO = {"role": "user", "content": "a"}
PATHS = {"messages": "chat/completions", "input": "responses"}
NAMES = [f"p{i}" for i in range(6000)]


def post(url: str, fields: Any, source: str = "127.0.0.1") -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(local_address=source), timeout=60) as client:
        path = next((path for name, path in PATHS.items() if name in fields), "completions")
        return client.post(f"{url}/v1/{path}", json=fields)


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ['""', "null", "5", "[]", '[{"prompt": "a"}]', "", "{"])
def test_a_body_that_is_no_json_object_is_refused(running: Running, body: str):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{running.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [{}] * 20_000},
        {"prompt": [1.5] * 20_000},
        {"messages": [5] * 20_000},
        {"messages": [HELLO], "tools": [5] * 20_000},
        {"prompt": "a", "logit_bias": {str(i): "x" for i in range(20_000)}},
        {"prompt": "a", **{str(i): 1 for i in range(20_000)}},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_a_body_with_too_large_a_part_is_refused_by_its_name_and_limit(running: Running, fields: Any):
    answer = post(running.url, fields)
    assert answer.status_code == 400
    assert f"at most {MAX_KEYS}" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [{}] * 1000}),
        (ChatRequest, {"messages": [5] * 1000}),
        (ChatRequest, {"messages": [HELLO], "tools": [{"type": "function", "function": {}}] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text"}] * 1000}]}),
    ],
    ids=["prompt", "messages", "tools", "parts"],
)
def test_the_check_of_a_list_ends_at_its_first_wrong_element(kind: Any, body: Any):
    with pytest.raises(ValueError, match="validation error") as found:
        kind.model_validate_json(json.dumps(body))
    assert found.value.error_count() < 20  # of each type that a union allows one
    with pytest.raises(ApiError):
        parse(json.dumps(body).encode(), kind, 4096)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"[" * 150 + b"]" * 150 + b"}"])
def test_what_is_nested_deep_is_refused(body: bytes):
    with pytest.raises(ApiError, match="nested more than"):
        check_json(body, 4096)


def test_large_bodies_are_read_beside_the_event_loop(running: Running, monkeypatch: pytest.MonkeyPatch):
    threads: list[str] = []
    whole = running.server.service.check_model

    def check(name: str | None) -> None:
        threads.append(threading.current_thread().name)
        whole(name)

    monkeypatch.setattr(running.server.service, "check_model", check)
    assert post(running.url, {"prompt": "a" * 400, "max_tokens": 1}).status_code == 200
    assert post(running.url, {"prompt": "a" * 40_000, "max_tokens": 1}).status_code == 400
    assert threads[0] != threads[1]
    assert threads[1].startswith("octavo read")


def test_a_body_in_chunks_is_refused_before_it_is_read(running: Running):
    with connected(running) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n[\r\n" * 1000)
        assert client.recv(100).startswith(b"HTTP/1.1 411")


def test_a_text_that_can_never_fit_is_refused_before_it_is_made_into_tokens(
    running: Running, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(running.server.service, "longest_token", 4)
    answer = post(running.url, {"prompt": "a" * 4 * 513})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "513 tokens or more" in answer.json()["error"]["message"]


# --- schemas ---------------------------------------------------------------------------------------------------------

TEXT = {"type": "string"}
CHAIN = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(3000)}


@pytest.mark.parametrize(
    ("schema", "limit"),
    [
        ({"properties": dict.fromkeys(NAMES[:3000], TEXT)}, "500 parts"),
        ({"anyOf": [TEXT] * 600}, "500 parts"),
        ({"enum": NAMES}, "5000 values"),
        ({"type": "string", "pattern": "a{100000}"}, "2000 characters"),
        ({"type": "string", "pattern": "((a{50}){50}){50}"}, "2000 characters"),
        ({"patternProperties": {"a{9999}": {}}}, "2000 characters"),
        ({"type": "string", "pattern": "(" * 100 + ")" * 100}, "64 deep"),
        ({"const": "a" * 200_000}, "131072 characters"),
        ({"type": "integer", "multipleOf": 15838001}, "10000"),
        ({"type": "number", "multipleOf": 0.0012347}, "10000"),
        ({"allOf": [{"multipleOf": 7919}, {"multipleOf": 7907}]}, "1000000"),
        ({"$defs": CHAIN, "$ref": "#/$defs/d0"}, "5000 values"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_schema_beyond_a_limit_is_refused_in_the_limits_words(running: Running, schema: Any, limit: str):
    with pytest.raises(OctavoError, match=limit):
        measure_schema(schema)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = post(running.url, {"messages": [HELLO], "response_format": form, "n": 3})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"
    assert len(answer.content) < 500


def test_a_schema_of_schemas_is_measured_to_its_depth():
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"items": schema}
    with pytest.raises(OctavoError, match="64 deep"):
        measure_schema(schema)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("abc", 3), (r"\d{4}-\d{2}", 7), ("[a-f]{3}", 3), (r"[^\]{9}]", 1), ("(ab){3}c", 7), ("(a|b)*", 2), ("a{2,}", 2)],
)
def test_a_patterns_size_is_its_characters_as_often_as_they_are_repeated(pattern: str, size: int):
    assert regex_size(pattern) == size
    assert regex_size(f"({pattern}){{{MAX_REPETITIONS}}}") >= MAX_REPETITIONS


def test_references_in_a_long_chain_within_the_limits_are_compiled(running: Running):
    chain = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1200)}
    running.llm.grammars.guide("json_schema", {"$defs": {**chain, "d1200": {}}, "$ref": "#/$defs/d0"})


def test_a_schema_whose_tokens_take_too_long_ends_its_answers(running: Running):
    guide = running.llm.grammars.guide("json_schema", {"type": "object", "title": "slow"})
    guide.clock.add(100)
    with pytest.raises(OctavoError, match="ms a token"):
        guide.restrict(torch.zeros(running.llm.model.bound.vocab_size), 100)


# --- connections -----------------------------------------------------------------------------------------------------


def connected(running: Running, source: str = "127.0.0.1") -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), source_address=(source, 0))
    client.settimeout(20)
    return client


def test_connections_are_fewer_than_the_files_a_process_may_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    assert Connections(Limits()).most == 768
    assert Connections(Limits(max_connections=10)).most == 10


def test_beyond_the_limit_the_client_with_the_most_connections_loses_its_longest_idle_one(pamphlet: Model):
    with serving(small(pamphlet), limits=Limits(max_connections=5)) as running:
        others = connected(running, "127.0.0.2")
        crowd = [connected(running) for _ in range(10)]
        for closed in crowd[:6]:
            assert closed.recv(1) == b""
        assert post(running.url, {"prompt": "a", "max_tokens": 1}, "127.0.0.2").status_code == 200
        others.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert others.recv(20).startswith(b"HTTP/1.1 200")
        for client in [*crowd, others]:
            client.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost:"], ids=["nothing", "half a head"])
def test_a_client_that_sends_no_request_is_closed(pamphlet: Model, sent: bytes):
    with serving(small(pamphlet), limits=Limits(patience=0.5)) as running, connected(running) as client:
        client.sendall(sent)
        assert client.recv(1) == b""


def test_a_client_that_never_reads_is_closed_and_its_blocks_are_free(pamphlet: Model):
    with serving(small(pamphlet), limits=Limits(timeout=3, patience=1)) as running:
        service, socks = running.server.service, []
        body = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True, "logprobs": 20})
        for _ in range(3):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect(running.server.sock.getsockname())
            head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            socks.append(client)
        wait_until(lambda: service.admitted == 3)
        wait_until(lambda: not running.server.connections.open)
        running.assert_idle()
        for client in socks:
            with client, pytest.raises(ConnectionResetError):
                list(iter(lambda client=client: client.recv(1 << 16), b""))


# --- fair queue -------------------------------------------------------------------------------------------------------


def ask(queue: FairQueue, client: str, started: list[str]) -> Ticket:
    return queue.ask(client, lambda: started.append(client))


def test_the_client_with_the_fewest_places_is_next():
    queue, started = FairQueue(2), list[str]()
    many = [ask(queue, "many", started) for _ in range(5)]
    ask(queue, "few", started)
    assert started == ["many", "many"]
    many[0].leave()
    assert started[2:] == ["few"]
    many[2].leave()  # it waits no longer
    many[1].leave()
    assert started[3:] == ["many"]
    assert many[3].begun


def test_a_place_is_kept_for_a_client_that_was_here():
    async def run() -> None:
        queue, started = FairQueue(4), list[str]()
        ask(queue, "few", started).leave()
        many = [ask(queue, "many", started) for _ in range(8)]
        assert started.count("many") == 3
        ask(queue, "few", started)
        assert started[-1] == "few"
        for ticket in many[:3]:
            ticket.leave()
        assert started.count("many") == 6

    asyncio.run(run())


def test_a_kept_place_is_given_on_once_it_is_kept_no_longer(monkeypatch: pytest.MonkeyPatch):
    """Nobody needs to come or leave for it."""
    monkeypatch.setattr("octavo.serve.fair_queue.KEPT", 0.05)

    async def run() -> None:
        queue, given = FairQueue(2), asyncio.Event()
        ask(queue, "many", [])
        ask(queue, "few", []).leave()
        queue.ask("many", given.set)
        assert not given.is_set()
        await asyncio.wait_for(given.wait(), 20)

    asyncio.run(run())


def test_a_queue_forgets_those_who_left_long_ago(monkeypatch: pytest.MonkeyPatch):
    queue, now = FairQueue(4), 0.0
    monkeypatch.setattr("octavo.serve.fair_queue.time.monotonic", lambda: now)
    for i in range(100):
        now += 1.0
        ask(queue, f"client {i}", []).leave()
    assert len(queue.left) == 30


def test_a_full_queue_refuses_the_client_that_fills_it(pamphlet: Model):
    with serving(small(pamphlet, max_batch_size=1), limits=Limits(max_queue=3)) as running:
        asked = {"prompt": "a", "max_tokens": 300, "ignore_eos": True}
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(post(running.url, asked, "127.0.0.2").status_code))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: running.server.service.admitted == 4)
        assert post(running.url, {"prompt": "a", "max_tokens": 1}).status_code == 200
        for thread in threads:
            thread.join(60)
        assert sorted(answers) == [200, 200, 200, 429]
        running.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_makes_room_while_it_is_made_into_tokens_is_refused_and_not_kept(
    pamphlet: Model, stream: bool, monkeypatch: pytest.MonkeyPatch
):
    kept: list[Kept] = []

    async def add(_: InMemory, one: Kept) -> None:
        kept.append(one)

    monkeypatch.setattr(InMemory, "add", add)
    with serving(small(pamphlet, max_batch_size=1), limits=Limits(max_queue=1)) as running:
        service, gate = running.server.service, threading.Event()
        asked = {"input": "a", "max_output_tokens": 1, "stream": stream}
        with ThreadPoolExecutor(3) as clients:
            for _ in range(2):  # as two long prompts that are made into tokens
                service.preparing.submit(gate.wait)
            answers = []
            for i, source in enumerate(("127.0.0.2", "127.0.0.2", "127.0.0.1")):
                answers.append(clients.submit(post, running.url, asked, source))
                wait_until(lambda i=i: len({client for client, _ in service.jobs.values()}) == 1 + i // 2)
                wait_until(lambda i=i: service.admitted == min(i + 1, 2))
            gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 429, 200]
        assert len(kept) == 2
        running.assert_idle()


def test_with_several_keys_each_is_a_client(pamphlet: Model):
    seen: list[str] = []
    with serving(small(pamphlet), api_key=("sesame", "other")) as running:
        service, job = running.server.service, running.server.service.job
        service.job = lambda client, *rest: seen.append(client) or job(client, *rest)  # type: ignore[method-assign]
        for key in ("sesame", "other"):
            running.client(key).completions.create(model="pamphlet", prompt="a", max_tokens=1)
        with pytest.raises(AuthenticationError, match="asks for a key"):
            running.client("none").completions.create(model="pamphlet", prompt="a", max_tokens=1)
    assert seen == ["key 0", "key 1"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer"}, {"x-api-key": ""}])
def test_an_empty_key_opens_nothing(pamphlet: Model, headers: dict[str, str]):
    with serving(small(pamphlet), api_key=("",)) as running:
        assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == 401


# --- the log ---------------------------------------------------------------------------------------------------------


def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("octavo", logging.WARNING, "file.py", 1, message, (), info)  # type: ignore[arg-type]


def test_a_log_line_is_short_and_quotes_no_prompt():
    line, told = logs.Line(prompts=False), logs.Line(prompts=True)
    assert len(line.format(record("é" * 10_000)).encode()) <= logs.LONGEST
    secret = KeyError("my prompt")
    assert "my prompt" not in line.format(record("it failed", secret))
    assert "KeyError" in line.format(record("it failed", secret))
    assert "my prompt" in told.format(record("it failed", secret))
    assert "out of memory" in line.format(record("it failed", RuntimeError("out of memory")))
    assert "my prompt" not in line.format(record("Task failed\nfuture: my prompt"))
    assert "\n" not in line.format(record("it failed", RuntimeError("a\nb")))


def test_of_one_kind_one_line_a_minute_is_written(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    rarely = logs.Rarely()
    assert [rarely.filter(record("a")) for _ in range(3)] == [True, False, False]
    assert rarely.filter(record("a", ValueError()))
    now[0] = 61
    again = record("a")
    assert rarely.filter(again)
    assert "2 more" in logs.Line(False).format(again)


@pytest.mark.parametrize(("host", "key", "warned"), [("127.0.0.1", (), 0), ("0.0.0.0", (), 1), ("0.0.0.0", "k", 0)])
def test_a_server_that_anyone_may_use_says_so_once(pamphlet: Model, caplog: Any, host: str, key: Any, warned: int):
    with bind(host, 0) as sock:
        Server(small(pamphlet), sock, api_key=key)
    assert sum("--api-key" in entry.message for entry in caplog.records) == warned


def test_a_turn_given_up_while_waiting_leaves_no_trace():
    async def run() -> FairQueue:
        queue = FairQueue(1)
        async with queue.place("a"):
            waiting = asyncio.create_task(queue.place("b").__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        return queue

    queue = asyncio.run(run())
    assert (queue.free, queue.lines) == (1, {})
