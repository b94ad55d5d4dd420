"""What the server does when there is too much, too slow, too late or too bad."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI

from octavo.errors import OctavoError
from octavo.models.model import Model
from octavo.serve.limits import Limits
from octavo.serve.listening import bind, url
from octavo.serve.server import Server
from octavo.text import TextStream
from tests.conftest import wait_until
from tests.serve.conftest import Running, serving, small

LONG: Any = {"model": "pamphlet", "prompt": "Once upon a time", "max_tokens": 500, "extra_body": {"ignore_eos": True}}


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True, **fields}


def post(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body(**fields), timeout=60)


class Behind(threading.Thread):
    """A request that is answered in the background."""

    def __init__(self, url: str, **fields: Any):
        super().__init__()
        self.url, self.fields = url, fields
        self.response: httpx.Response
        self.start()

    def run(self) -> None:
        self.response = post(self.url, **self.fields)

    def done(self) -> httpx.Response:
        self.join(60)
        return self.response


# --- clients that leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_and_no_other(running: Running, stream: bool):
    scheduler = running.llm.engine.scheduler
    stays = Behind(running.url, max_tokens=200)
    wait_until(lambda: len(scheduler.running) == 1)
    address = running.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as leaving:
        content = json.dumps(body(stream=stream, n=2)).encode()
        head = ["POST /v1/completions HTTP/1.1", "Host: a", "Content-Type: application/json"]
        head += [f"Content-Length: {len(content)}", "", ""]
        leaving.sendall("\r\n".join(head).encode() + content)
        wait_until(lambda: len(scheduler.running) == 3)
    wait_until(lambda: len(scheduler.running) == 1)
    scheduler.check()
    answer = stays.done().json()
    assert answer["usage"]["completion_tokens"] == 200


def test_a_stream_that_is_closed_is_ended(running: Running, client: OpenAI):
    stream = client.completions.create(stream=True, **LONG)
    next(iter(stream))
    stream.close()
    running.assert_idle()


# --- too many --------------------------------------------------------------------------------------------------------


def test_beyond_the_queue_requests_are_refused_and_welcome_later(pamphlet: Model):
    with serving(small(pamphlet, max_batch_size=2), limits=Limits(max_queue=1)) as running:
        busy = [Behind(running.url, max_tokens=150) for _ in range(3)]
        wait_until(lambda: running.server.service.admitted == 3)
        refused = post(running.url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert [one.done().status_code for one in busy] == [200] * 3
        assert post(running.url, max_tokens=2).status_code == 200
        too_many = post(running.url, n=4)
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
        running.assert_idle()


def test_first_come_is_first_served(pamphlet: Model):
    with serving(small(pamphlet, max_batch_size=1)) as running:
        ended: list[int] = []

        def ask(i: int) -> None:
            post(running.url, max_tokens=30)
            ended.append(i)

        threads = []
        for i in range(5):
            threads.append(threading.Thread(target=ask, args=(i,)))
            threads[-1].start()
            wait_until(lambda i=i: running.server.service.admitted > i - len(ended))
            time.sleep(0.03)
        for thread in threads:
            thread.join(60)
        assert ended == [0, 1, 2, 3, 4]


# --- too late --------------------------------------------------------------------------------------------------------


def test_at_the_deadline_an_answer_is_what_there_is_and_one_not_begun_is_504(pamphlet: Model):
    with serving(small(pamphlet, max_batch_size=1), limits=Limits(timeout=0.7)) as running:
        choice = post(running.url).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["text"]
        running.server.service.worker.inbox.put(lambda: time.sleep(2.5))  # as a step may on a busy machine
        for late in [Behind(running.url), Behind(running.url, stream=True)]:
            assert late.done().status_code == 504
            assert late.done().json()["error"]["code"] == "timeout"
        running.assert_idle()


# --- too bad ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', None, 415),
        (b'{"prompt": "' + b"a" * (9 << 20) + b'"}', "application/json", 413),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_request_is_refused_in_openais_form(running: Running, content: bytes, kind: str | None, status: int):
    headers = {"Content-Type": kind} if kind else {}
    answer = httpx.post(f"{running.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_unknown_paths_and_methods_are_refused_in_the_same_form(running: Running):
    assert httpx.get(f"{running.url}/v1/embeddings").json()["error"]["type"] == "not_found_error"
    refused = httpx.get(f"{running.url}/v1/completions")
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")


def test_a_request_whose_sampling_fails_costs_the_others_nothing(running: Running, monkeypatch: pytest.MonkeyPatch):
    from octavo.grammars.guides import GrammarGuide

    def fail(*_: Any) -> None:
        raise RuntimeError("no grammar")

    monkeypatch.setattr(GrammarGuide, "restrict", fail)
    other = Behind(running.url, max_tokens=100)
    wait_until(lambda: bool(running.llm.engine.scheduler.running) or not other.is_alive())
    chat: Any = {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}
    for stream in (False, True):
        answer = httpx.post(f"{running.url}/v1/chat/completions", json={**chat, "stream": stream})
        assert answer.status_code == 500
        assert "demands" in answer.json()["error"]["message"]
    assert other.done().json()["usage"]["completion_tokens"] == 100


def test_a_step_that_fails_ends_the_running_answers_and_the_engine_goes_on(pamphlet: Model):
    with serving(small(pamphlet, max_batch_size=2)) as running:
        engine, runner = running.llm.engine, running.llm.engine.runner
        first, whole = Behind(running.url), runner.run
        wait_until(lambda: len(engine.scheduler.running) == 1 and engine.scheduler.running[0].output)

        def fail_once(_: Any) -> Any:
            runner.run = whole
            raise RuntimeError("out of memory")

        waiting = [Behind(running.url, max_tokens=20) for _ in range(3)]
        wait_until(lambda: running.server.service.admitted == 4)
        runner.run = fail_once
        assert first.done().status_code == 500
        assert first.done().json()["error"]["type"] == "server_error"
        assert sorted(one.done().status_code for one in waiting) in ([200, 200, 500], [200, 200, 200])
        health = httpx.get(f"{running.url}/health")
        assert (health.status_code, health.json()) == (200, {"status": "ok", "failed_steps": 1})
        running.assert_idle()


def fail(*_: Any) -> Any:
    raise RuntimeError("the device is gone")


def steps_fail(server: Server) -> None:
    server.service.llm.engine.runner.run = fail
    assert [post(url(server.sock)).status_code for _ in range(3)] == [500] * 3


def command_fails(server: Server) -> None:
    server.service.worker.inbox.put(fail)


@pytest.mark.parametrize("end", [steps_fail, command_fails])
def test_an_engine_that_only_fails_is_given_up_and_the_process_told(pamphlet: Model, end: Callable[[Server], None]):
    with bind("127.0.0.1", 0) as sock:
        server = Server(small(pamphlet), sock, grace=0.9)
        assert server.uvicorn.config.timeout_graceful_shutdown == 0.9
        outcome: list[Exception] = []

        def run() -> None:
            try:
                server.run()
            except OctavoError as error:
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: server.uvicorn.started)

        end(server)
        thread.join(20)
        assert "the engine failed" in str(outcome[0])


def requests_with(running: Running, route: str, status: int) -> float:
    return running.server.service.metrics.requests.labels(route, status)._value.get()


def test_an_answer_whose_text_cannot_be_made_is_forgotten(running: Running, monkeypatch: pytest.MonkeyPatch):
    def fail_once(_: TextStream) -> str:
        monkeypatch.undo()
        raise RuntimeError("no text")

    monkeypatch.setattr(TextStream, "flush", fail_once)
    assert post(running.url, max_tokens=3).status_code == 500
    assert running.llm.begun == []
    assert post(running.url, max_tokens=3).status_code == 200


def test_a_failure_is_counted_as_one(running: Running, monkeypatch: pytest.MonkeyPatch):
    before = requests_with(running, "/v1/completions", 500)
    monkeypatch.setattr(running.server.service, "check_model", fail)
    assert post(running.url).json()["error"]["type"] == "server_error"
    assert requests_with(running, "/v1/completions", 500) == before + 1


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_error(running: Running):
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    asyncio.run(running.server.uvicorn.config.app(scope, receive, send))
    assert sent[0]["status"] == 499


# --- doors -----------------------------------------------------------------------------------------------------------


def test_with_a_key_only_those_who_have_it_are_answered(pamphlet: Model):
    with serving(small(pamphlet), api_key="sesame") as running:
        assert running.client("sesame").models.list().data
        for wrong in ("open", "sesame2", "ä"):
            for path in ("/v1/models", "/cache", "/metrics"):
                answer = httpx.get(running.url + path, headers={"Authorization": f"Bearer {wrong}".encode()})
                assert answer.status_code == 401
        assert post(running.url).status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_other_origins_are_let_in_only_by_name(pamphlet: Model, running: Running):
    asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    closed = httpx.options(f"{running.url}/v1/completions", headers=asks)
    assert "access-control-allow-origin" not in closed.headers
    with serving(small(pamphlet), cors_origins=("https://page.example",), api_key="sesame") as open_:
        allowed = httpx.options(f"{open_.url}/v1/completions", headers=asks)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = httpx.options(f"{open_.url}/v1/completions", headers={**asks, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


# --- the end ---------------------------------------------------------------------------------------------------------


def test_after_a_signal_no_answer_begins_and_after_the_grace_time_the_running_ones_are_cut_off(pamphlet: Model):
    """What uvicorn calls at SIGINT is called here; test_operation.py sends a process a signal."""
    with serving(small(pamphlet, session_len=2048), grace=0.5) as running:
        whole, streamed = (Behind(running.url, max_tokens=2000, stream=stream) for stream in (False, True))
        wait_until(lambda: len(running.llm.engine.scheduler.running) == 2)
        running.server.uvicorn.handle_exit(signal.SIGINT, None)
        wait_until(lambda: not _up(running.url))
        assert whole.done().status_code == 503
        assert "the server was stopped" in streamed.done().text


def _up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
