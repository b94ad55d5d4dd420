"""Replicas behind one address on a cluster of two nodes: the server's own answers, whatever becomes of a replica."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx2 as httpx
import pytest

from octavo.llm import LLM
from tests.ray.conftest import (
    EXACT,
    INGRESS,
    PROXY,
    SIZES,
    URL,
    ask,
    delete,
    get,
    kill,
    kill_replica,
    post,
    replicas,
    soon,
    stream,
    together,
)
from tests.serve.conftest import serving

pytestmark = pytest.mark.slow
PROSE = "Once upon a time there was a king who had three sons. " * 12  # three blocks
STORY = {"prompt": PROSE, "max_tokens": 4, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8, "temperature": 0}


def same(document: Any) -> Any:
    """Without what is another in every answer."""
    if isinstance(document, dict):
        return {name: same(value) for name, value in document.items() if name not in ("id", "created", "created_at")}
    return [same(one) for one in document] if isinstance(document, list) else document


def events(response: httpx.Response) -> list[Any]:
    found = [line[6:] for line in response.text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    return [json.loads(line) for line in found]


@pytest.fixture(scope="module")
def single() -> Iterator[str]:
    """The address of a server without Ray."""
    with serving(LLM(kv="kv8", **EXACT, **SIZES)) as running:
        yield running.url


def test_the_application_is_that_of_one_server(deploy: Callable[..., None], single: str):
    """docs/serve.yaml has the schema of Ray's, and what it describes runs: answers, streams and errors of every kind of
    route are the same, but for ids and times."""
    deploy()
    assert {one["format"] for one in replicas()} == {"kv8"}
    posts = {
        "/v1/completions": [
            {"prompt": PROSE, "max_tokens": 4, "temperature": 0},
            {"prompt": 3},
            {"prompt": "a", "n": 999},
        ],
        "/v1/chat/completions": [CHAT, CHAT | {"stream": True}, CHAT | {"model": "none"}, CHAT | {"topp": 1}],
        "/v1/messages": [CHAT | {"model": "pamphlet"}, CHAT | {"model": "pamphlet", "stream": True}],
        "/v1/responses": [{"input": "Hello", "previous_response_id": "resp_1"}],
        "/tokenize": [{"prompt": "Hello"}],
        "/v1/nothing": [{}],
    }
    for path, bodies in posts.items():
        for body in bodies:
            one, other = (post(f"{url}{path}", json=body) for url in (single, URL))
            assert other.status_code == one.status_code, (path, body, other.text)
            assert other.headers["content-type"] == one.headers["content-type"]
            if body.get("stream"):
                assert same(events(other)) == same(events(one))
            else:
                assert same(other.json()) == same(one.json())
    for path in ("/health", "/v1/models", "/version", "/"):
        assert get(f"{URL}{path}").status_code == 200
    chunked = post(f"{URL}/v1/completions", content=iter([b"{}"]), headers={"content-type": "application/json"})
    assert chunked.status_code == 411


def test_a_client_that_leaves_ends_its_answer(deploy: Callable[..., None]):
    deploy()
    with stream("POST", f"{URL}/v1/completions", json={"prompt": "Once", "max_tokens": 400, "stream": True}) as one:
        next(one.iter_lines())
    soon(idle)
    assert sum(one["generated_tokens"] for one in replicas()) < 400
    assert "octavo_requests_aborted_total" in get(f"{URL}/metrics").text


@pytest.mark.parametrize("killed", [INGRESS, PROXY], ids=["ingress", "proxy"])
def test_a_stream_whose_way_is_killed_breaks_and_the_address_answers_again(
    deploy: Callable[..., None], killed: str, slowly: Callable[[int], int]
):
    """Nobody is left to tell an error. The connection breaks in the middle of the answer, which no client of HTTP takes
    for its end; Ray starts what was killed anew."""
    deploy()
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    for _ in range(slowly(5)):
        with stream("POST", f"{URL}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            kill(killed)
            with pytest.raises(httpx.TransportError):
                list(lines)
        soon(answers)
    soon(idle)


def answers() -> bool:
    """Whether the address does."""
    with suppress(httpx.TransportError):
        return ask("Once upon a time", 2).status_code == 200
    return False


def idle() -> bool:
    """Whether no replica computes an answer."""
    return not any(one["sessions_running"] for one in replicas())


@contextmanager
def load() -> Iterator[None]:
    """Requests that never cease meanwhile, each of which is answered."""
    ceased, statuses = threading.Event(), []

    def ask_on(i: int) -> None:
        while not ceased.is_set():
            statuses.append(ask(f"{i} Once upon a time", 8).status_code)
            time.sleep(0.5)

    with ThreadPoolExecutor(2) as pool:
        asking = pool.map(ask_on, range(2))
        try:
            yield
        finally:
            ceased.set()
        list(asking)  # raises what a thread has raised
    assert set(statuses) == {200}
    assert len(statuses) > 4


def test_scaling_loses_nothing(deploy: Callable[..., None]):
    """While a replica is added, requests are answered."""
    deploy()
    with load():
        deploy(2)


def test_a_conversation_finds_its_blocks_again(deploy: Callable[..., None]):
    """Every further turn of each of eight conversations finds all whole blocks of its last one."""
    deploy(2)
    said = [f"{i} {PROSE}" for i in range(8)]
    for turn in range(3):
        found = [ask(text).json() for text in said]
        for i, one in enumerate(found):
            cached = one["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 0) == (turn > 0), (turn, i, one["usage"])
            said[i] += one["choices"][0]["text"]
    assert all(one["prefix_hit_tokens"] > 0 for one in replicas()), "both replicas have conversations"
    text = get(f"{URL}/metrics").text
    assert all(f'replica="{one["replica"]}"' in text for one in replicas())


def test_killed_replicas_cost_no_request_without_an_error(
    deploy: Callable[..., None], slowly: Callable[[int], int], record_property: Callable[[str, Any], None]
):
    """Twenty times a replica is killed under load: every answer is right and whole, or ends with one error that says
    what happened; nothing hangs, and nothing of a wrong answer is told. The first to be killed has made a response,
    which is gone on with by others: all keep them in one store."""
    kills = slowly(20)
    deploy(min(3, kills + 1))
    before = {one["replica"]: one["generated_tokens"] for one in replicas()}
    response = post(f"{URL}/v1/responses", json={"input": "Tell me a story.", "max_output_tokens": 4})
    (maker,) = [one["replica"] for one in replicas() if one["generated_tokens"] > before[one["replica"]]]
    prompts = [f"{i} Once upon a time" for i in range(6)]
    right = [one.json()["choices"][0]["text"] for one in together(6, lambda i: ask(prompts[i], 48))]
    came: dict[str, int] = {"whole": 0, "broken": 0, "refused": 0}
    rng = random.Random(0)

    def one(i: int) -> str:
        response = ask(prompts[i], 48, stream=i % 2 == 0)
        if i % 2:
            if response.status_code == 200:
                assert response.json()["choices"][0]["text"] == right[i]
                return "whole"
            assert response.json()["error"]["code"] == "replica_lost", response.text
            return "refused"
        if response.status_code != 200:
            assert response.json()["error"]["code"] == "replica_lost", response.text
            return "refused"
        told = events(response)
        errors = [event["error"] for event in told if "error" in event]
        text = "".join(event["choices"][0]["text"] for event in told if "error" not in event)
        if not errors:
            assert text == right[i]
            return "whole"
        assert [error["code"] for error in errors] == ["replica_lost"]
        assert "error" in told[-1]
        assert right[i].startswith(text)
        return "broken"

    for nth in range(kills):
        alive = soon(lambda: len(found := replicas()) > 1 and found)
        victim = rng.choice(alive)["replica"] if nth else maker
        timer = threading.Timer(rng.uniform(0, 0.4), kill_replica, [victim])
        timer.start()
        for how in together(6, one):
            came[how] += 1
        timer.join()
    record_property("answers", came)
    print(f"{kills} kills: {came}")
    assert sum(came.values()) == 6 * kills
    assert_kept(response.json())
    soon(lambda: len(replicas()) == min(3, kills + 1))


def assert_kept(response: dict[str, Any]) -> None:
    """It is found, gone on with, and deleted."""
    id = response["id"]
    later = {"input": "Go on.", "previous_response_id": id, "max_output_tokens": 4}
    assert post(f"{URL}/v1/responses", json=later).json()["previous_response_id"] == id
    assert same(get(f"{URL}/v1/responses/{id}").json()) == same(response)
    assert delete(f"{URL}/v1/responses/{id}").json()["deleted"]
    assert post(f"{URL}/v1/responses", json=later).json()["error"]["param"] == "previous_response_id"


def test_a_rolling_update_loses_nothing(deploy: Callable[..., None]):
    """While replicas are taken away and replaced by another model's, requests are answered; a conversation that one of
    the first had is found by that of later, which reads what they have saved."""
    deploy(2)
    said = f"Long ago. {PROSE}"
    assert ask(said, 4).status_code == 200
    with load():
        deploy(served_model_name=["newer"])
    again = ask(said, 4).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert again > 0
    assert sum(one["restored_tokens"] for one in replicas()) == again


def test_the_command_serves_replicas_until_it_is_told_to_stop():
    """`octavo serve --replicas` tells its address, answers who has a key, and ends with status 0. One stands for
    several here."""
    command = [sys.executable, "-m", "octavo", "serve", "--replicas", "1", "--port", "0", "--json", "--dtype", "fp32"]
    own = {**os.environ, "OCTAVO_API_KEY": "secret"}
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            told = json.loads(next(line for line in process.stdout if line.startswith("{")))
            assert told["replicas"] == 1
            body = {"prompt": "Once upon a time", "max_tokens": 4}
            key = {"Authorization": "Bearer secret"}
            assert post(f"{told['url']}/v1/completions", json=body, headers=key).status_code == 200
            assert post(f"{told['url']}/v1/completions", json=body).status_code == 401
            assert get(f"{told['url']}/metrics").status_code == 401
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            process.kill()
