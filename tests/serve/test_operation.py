"""How a server is run: its log, its stop, its names, where it listens, and how a start fails."""

from __future__ import annotations

import json
import logging
import re
import signal
import ssl
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from octavo import LLM, OctavoError
from octavo.cli.loading import LoadOptions
from octavo.models.model import Model
from octavo.serve import logs
from octavo.serve.listening import Tls, bind_unix, listening, url
from octavo.serve.server import Server
from tests.conftest import status_of, wait_until
from tests.serve.conftest import Running, serving, small

CHAT = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8, "temperature": 0}


def ask(running: Running, **more: Any) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | more, timeout=60)


# --- the request log -------------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name == logs.REQUESTS]


def test_a_request_is_one_line_with_its_tokens_times_and_end(running: Running, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "octavo"):
        answer = ask(running, n=2, seed=1).json()
        wait_until(lambda: len(lines(caplog)) == 1)
    (line,) = lines(caplog)
    usage = answer["usage"]
    told = dict(part.split("=") for part in line.split() if "=" in part)
    assert line.startswith(f"POST /v1/chat/completions 200 id={answer['id']} ")
    assert int(told["prompt"]) == usage["prompt_tokens"]
    assert int(told["cached"]) == usage["prompt_tokens_details"]["cached_tokens"]
    assert int(told["generated"]) == usage["completion_tokens"] == 16
    assert told["end"] == "length"
    assert told["client"] == "127.0.0.1"
    assert float(told["queue"][:-1]) <= float(told["first"][:-1]) <= float(told["total"][:-1])


def test_a_refusal_is_logged_by_code_and_field_and_its_message_at_debug_alone(
    running: Running, caplog: pytest.LogCaptureFixture
):
    for level, told in ((logging.INFO, False), (logging.DEBUG, True)):
        caplog.clear()
        with caplog.at_level(level, "octavo"):
            assert ask(running, top_q=1).status_code == 400
            assert httpx.get(f"{running.url}/health").status_code == 200  # one that looks is not logged
            wait_until(lambda: len(lines(caplog)) == 1)
        assert " 400 id=- " in lines(caplog)[0]
        assert "code='unknown_parameter' param='top_q'" in lines(caplog)[0]
        assert ("there is no such field" in lines(caplog)[0]) == told


def test_a_client_that_leaves_is_logged_with_what_was_generated(running: Running, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "octavo"):
        with httpx.stream(
            "POST", f"{running.url}/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 400}
        ) as answer:
            next(answer.iter_lines())
        wait_until(lambda: len(lines(caplog)) == 1)
    assert int(re.search(r"generated=(\d+)", lines(caplog)[0])[1]) > 0  # type: ignore[index]
    assert "end=abort" in lines(caplog)[0] or "end=-" in lines(caplog)[0]


@pytest.fixture
def own_log() -> Iterator[None]:
    """Whatever the test does to this process's logging is undone."""
    root, requests, handlers = logging.getLogger(), logging.getLogger(logs.REQUESTS), logging.getLogger().handlers[:]
    show = warnings.showwarning
    yield
    warnings.showwarning = show
    root.handlers[:] = handlers
    for logger in (root, requests.parent, requests):
        logger.setLevel(logging.WARNING if logger is root else logging.NOTSET)
    requests.disabled = False


@pytest.mark.usefixtures("own_log")
@pytest.mark.parametrize(
    ("level", "requests", "written"), [("info", True, 3), ("info", False, 1), ("warning", True, 0)]
)
def test_the_log_has_what_its_options_say(level: str, requests: bool, written: int, capsys: pytest.CaptureFixture[str]):
    logs.start(level=level, requests=requests)
    for _ in range(2):  # every request has its line, other messages one of a kind
        logging.getLogger(logs.REQUESTS).info("POST /v1/completions 200")
        logging.getLogger("octavo").info("stopping")
    assert len(capsys.readouterr().err.splitlines()) == written


@pytest.mark.usefixtures("own_log")
def test_a_warning_is_logged_in_one_line_without_the_source_it_is_in(capsys: pytest.CaptureFixture[str]):
    logs.start()
    for _ in range(2):
        warnings.warn("the calibration covers fewer positions", stacklevel=1)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(" WARNING py.warnings: the calibration covers fewer positions")


# --- names, doors ----------------------------------------------------------------------------------------------------


def test_a_model_of_several_names_is_served_by_each(pamphlet: Model):
    with serving(small(pamphlet), names=["story", "gpt-4o"]) as running:
        listed = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert [(one["id"], one["max_model_len"], one["context_length"]) for one in listed] == [
            ("story", 512, 512),
            ("gpt-4o", 512, 512),
        ]
        assert httpx.get(f"{running.url}/v1/models/gpt-4o").json() == listed[1]
        answers = [ask(running, model=name) for name in ("story", "gpt-4o", "gpt-5")]
        assert [answer.status_code for answer in answers] == [200, 200, 404]
        assert "story, gpt-4o" in answers[2].json()["error"]["message"]


def test_a_page_of_a_named_origin_may_ask_and_another_may_not(pamphlet: Model):
    with serving(small(pamphlet), cors_origins=("https://chat.example",), api_key="secret") as running:
        for origin, allowed in (("https://chat.example", True), ("https://other.example", False)):
            asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            asks["Access-Control-Request-Headers"] = "authorization,content-type"
            preflight = httpx.options(f"{running.url}/v1/chat/completions", headers=asks)
            assert (preflight.headers.get("access-control-allow-origin") == origin) == allowed
            refused = httpx.get(f"{running.url}/v1/models", headers={"Origin": origin})
            assert refused.status_code == 401
            assert (refused.headers.get("access-control-allow-origin") == origin) == allowed


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    path = tmp_path_factory.mktemp("tls")
    tls = Tls(path / "cert.pem", path / "key.pem")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    try:
        files = ["-keyout", str(tls.key), "-out", str(tls.certificate)]
        subprocess.run([*new, *files, *named], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    return tls


def test_answers_come_by_https_to_a_client_that_knows_the_certificate(pamphlet: Model, certificate: Tls):
    with serving(small(pamphlet), tls=certificate) as running:
        secure = running.url.replace("http:", "https:")
        trusting = ssl.create_default_context(cafile=str(certificate.certificate))
        with httpx.Client(verify=trusting, timeout=60) as client:
            assert client.post(f"{secure}/v1/chat/completions", json=CHAT).json()["usage"]["completion_tokens"] == 8
            streamed = client.post(f"{secure}/v1/chat/completions", json=CHAT | {"stream": True}).text
            assert streamed.endswith("data: [DONE]\n\n")
        running.assert_idle()


def test_a_certificate_that_is_none_is_one_error(tmp_path: Path, certificate: Tls):
    (tmp_path / "none.pem").write_text("none")
    for tls in (Tls(tmp_path / "missing.pem"), Tls(tmp_path / "none.pem"), Tls(certificate.certificate)):
        with pytest.raises(OctavoError, match=f"TLS by .*{tls.certificate.name}"):
            tls.check()
    locked = tmp_path / "locked.pem"
    make = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", str(certificate.key), "-out", str(locked)]
    subprocess.run(make, check=True, capture_output=True)
    with pytest.raises(OctavoError, match="password"):
        Tls(certificate.certificate, locked).check()


def test_a_unix_socket_is_served_and_a_left_over_file_replaced(pamphlet: Model, tmp_path: Path):
    path = tmp_path / "octavo.sock"
    bind_unix(path).close()  # a server that was killed leaves its file
    with listening(bind_unix(path)) as sock:
        sock.listen()
        with pytest.raises(OctavoError, match="cannot be served"):
            bind_unix(path)  # this one is alive
    assert not path.exists()
    with listening(bind_unix(path)) as sock, serving(small(pamphlet), sock):
        assert url(sock) == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=60) as client:
            answer = client.post("http://localhost/v1/chat/completions", json=CHAT)
        assert answer.json()["usage"]["completion_tokens"] == 8
    assert not path.exists()
    path.write_text("a file of someone")
    with pytest.raises(OctavoError, match="choose another --uds"):
        bind_unix(path)
    assert path.read_text() == "a file of someone"


# --- the process -----------------------------------------------------------------------------------------------------


@contextmanager
def process(*options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "octavo", "serve", "--session-len", "512", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def test_a_server_says_where_it_is_and_what_to_ask_and_at_sigterm_ends_its_answers_and_saves_them(tmp_path: Path):
    with process("--port", "0", "--session-dir", str(tmp_path), "--served-model-name", "story") as server:
        assert server.stderr is not None
        start: list[str] = []
        while not (start and start[-1].startswith("curl ")):
            start.append(server.stderr.readline())
            assert start[-1], f"the server ended: {start}"
        address = re.search(r"a chat at (http://127.0.0.1:\d+)/", "".join(start))[1]  # type: ignore[index]
        told = subprocess.run(["bash", "-c", start[-1]], capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(told.stdout)["model"] == "story"

        body = CHAT | {"stream": True, "max_tokens": 300, "ignore_eos": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
            said = answer.iter_lines()
            next(said)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in said if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        log = server.stderr.read()
        assert server.wait(30) == 0
    assert "generated=300" in log
    assert "leaked" not in log  # of the native modules nothing outlives the interpreter
    assert "Traceback" not in log
    assert "a story" not in log
    assert log.index("stopping: ") < log.index("conversations that are saved: ") < log.index("stopped")
    saved = re.search(r"conversations that are saved: (\d+)", log)
    assert saved
    assert int(saved[1]) == len(list(tmp_path.glob("*.session"))) > 0


@pytest.mark.usefixtures("own_log")
def test_what_is_served_is_told_as_json(
    pamphlet: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(LoadOptions, "load", lambda *_, **__: pamphlet)
    monkeypatch.setattr(Server, "run", lambda _: None)
    assert status_of("serve", "--kv", "int8-token", "--port", "0", "--max-batch-size", "2", "--json") == 0
    state = json.loads(capsys.readouterr().out)
    assert state["model"] == "pamphlet"
    assert state["sessions"] * 2048 == state["cache_tokens"]
    assert (state["kv"], state["token_bytes"]) == ("int8-token", 1560)
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d+", state["url"])


@pytest.mark.usefixtures("own_log")
def test_a_model_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def load(*_: Any, **__: Any) -> None:
        raise KeyError("rope_scaling")

    monkeypatch.setattr(LLM, "__init__", load)
    assert status_of("serve", "--port", "0") == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.splitlines()[-1:] == [
        "error: the model cannot be loaded: KeyError: 'rope_scaling'; --log-level debug says where"
    ]
