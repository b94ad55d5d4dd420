"""`--session-dir`: conversations outlive the server, and nothing in the directory can harm a request."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from openai import BadRequestError

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.models.model import Model
from octavo.serve import sessions as module
from octavo.serve.sessions import SessionDir
from octavo.serve.worker import Worker
from tests.conftest import status_of, wait_until
from tests.serve.conftest import Running, serving, small

PLENTY = 1 << 30


@contextmanager
def keeping(directory: Path, model: Model, limit: int = PLENTY, **more: object) -> Iterator[tuple[Running, SessionDir]]:
    """A server that has seen nothing but the directory."""
    llm = LLM(model, **{"kv": "fp32", "session_len": 512, "max_batch_size": 4, **more})
    sessions = SessionDir(directory, limit, llm)
    with serving(llm, sessions=sessions) as running:
        yield running, sessions


def ask(running: Running, prompt: list[int], max_tokens: int = 4) -> tuple[str, int]:
    """The greedy answer, and how many tokens of the prompt were cached."""
    name = running.server.service.name
    reply = running.client().completions.create(model=name, prompt=prompt, temperature=0, max_tokens=max_tokens)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    return reply.choices[0].text, reply.usage.prompt_tokens_details.cached_tokens or 0


class Beside:
    """Stands for a worker: its engine is at rest, and something happens whenever it is called."""

    def __init__(self, llm: LLM, meanwhile: Callable[[], None] = lambda: None):
        self.llm, self.meanwhile = llm, meanwhile

    async def call(self, function: Callable[[LLM], Any]) -> Any:
        self.meanwhile()
        return function(self.llm)


def save(sessions: SessionDir, llm: LLM, *more: list[int], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Save what is fresh and these conversations, of which all but the last token is cached."""
    for tokens in more:
        llm.generate(tokens, SamplingParams(max_tokens=1))
        sessions.remember(tokens)
    asyncio.run(sessions.save(Beside(llm, meanwhile)))  # type: ignore[arg-type]


@pytest.fixture
def prompts(text_ids: list[int]) -> list[list[int]]:
    """Each of one whole block."""
    return [text_ids[i : i + 70] for i in (0, 100, 200)]


def test_a_conversation_outlives_the_server(pamphlet: Model, text_ids: list[int], tmp_path: Path):
    prompt = text_ids[:140]
    with keeping(tmp_path / "new" / "dir", pamphlet) as (running, _):
        first = ask(running, prompt)
        assert first[1] == 0
        cold = ask(running, text_ids[:200])
    with keeping(tmp_path / "new" / "dir", pamphlet) as (running, sessions):
        assert ask(running, prompt) == (first[0], 128)
        assert sessions.restored_tokens == 128
        assert ask(running, text_ids[:200])[0] == cold[0]
        running.assert_idle()
        state = json.load(urlopen(f"{running.url}/cache"))
        assert (state["sessions_saved"], state["restored_tokens"]) == (1, 192)
        assert state["sessions_saved_bytes"] == sum(
            file.stat().st_size for file in (tmp_path / "new" / "dir").iterdir()
        )


def test_what_went_on_replaces_what_was_saved_of_it(pamphlet: Model, text_ids: list[int], tmp_path: Path):
    for length in (70, 140, 200):
        with keeping(tmp_path, pamphlet) as (running, _):
            ask(running, text_ids[:length])
        assert len(list(tmp_path.iterdir())) == 1
    with keeping(tmp_path, pamphlet) as (running, _):
        assert ask(running, text_ids[:250])[1] == 192
        assert ask(running, text_ids[:100])[1] == 64


def test_a_quiet_conversation_is_saved_while_the_server_runs(
    pamphlet: Model, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "QUIET", 0.05)
    with keeping(tmp_path, pamphlet) as (running, sessions):
        ask(running, prompts[0])
        wait_until(lambda: len(sessions.chains) == 1)
        assert [file.suffix for file in tmp_path.iterdir()] == [".session"]
        # What is evicted from the cache comes back from the directory, without a restart.
        running.llm.engine.pool.clear()
        assert ask(running, prompts[0])[1] == 64


def test_incomplete_corrupted_and_strange_files_cost_a_warning_each_and_no_request(
    pamphlet: Model, prompts: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with keeping(tmp_path, pamphlet) as (running, _):
        answers = [ask(running, prompt)[0] for prompt in prompts]
    short, altered, headless = sorted(tmp_path.iterdir())
    short.write_bytes(short.read_bytes()[:-100])
    altered.write_bytes(altered.read_bytes()[:-100] + bytes(100))
    headless.write_bytes(headless.read_bytes()[:100])
    kind = short.name.split(".")[1]
    (tmp_path / f"{'0' * 32}.{kind}.session").write_bytes(b"")
    killed = tmp_path / f".{'1' * 32}.{kind}.session.x.part"
    killed.mkdir()
    (killed / ".tmpx").write_bytes(b"half a file of a server that was killed")
    strange = ["notes.txt", ".tmpx", "none.session", ".x.session.1.part", f"{'0' * 32}.another.session"]
    for name in strange:
        (tmp_path / name).write_text("not one of its own: left alone")
    with caplog.at_level(logging.WARNING), keeping(tmp_path, pamphlet) as (running, sessions):
        assert len(sessions.chains) == 2
        assert [ask(running, prompt) for prompt in prompts] == [(answer, 0) for answer in answers]
        running.assert_idle()
        assert len(caplog.records) == 4
    with keeping(tmp_path, pamphlet) as (running, _):  # what was computed again has been saved again
        assert [ask(running, prompt) for prompt in prompts] == [(answer, 64) for answer in answers]
    assert {*strange} == {file.name for file in tmp_path.iterdir()} - {short.name, altered.name, headless.name}


def test_files_whose_names_were_exchanged_are_not_used_and_not_removed(
    pamphlet: Model, prompts: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The rows of one conversation under the name of another would answer wrongly without a sign."""
    with keeping(tmp_path, pamphlet) as (running, _):
        answers = [ask(running, prompt)[0] for prompt in prompts[:2]]
    first, second = sorted(tmp_path.iterdir())
    contents = {first.read_bytes(), second.read_bytes()}
    with caplog.at_level(logging.WARNING), keeping(tmp_path, pamphlet) as (running, _):
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)
        for _ in range(2):
            assert [ask(running, prompt)[0] for prompt in prompts[:2]] == answers
            running.llm.engine.pool.clear()
        assert sum("another conversation" in record.message for record in caplog.records) == 2, "once for each file"
        assert {first.read_bytes(), second.read_bytes()} == contents


def test_a_pipe_in_the_directory_does_not_stop_the_server_from_starting(pamphlet: Model, tmp_path: Path):
    llm = small(pamphlet)
    kind = SessionDir(tmp_path, PLENTY, llm).kind
    os.mkfifo(tmp_path / f"{'0' * 32}.{kind}.session")
    assert SessionDir(tmp_path, PLENTY, llm).chains == {}


def test_what_cannot_be_read_now_is_kept_for_later(
    pamphlet: Model, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    with keeping(tmp_path, pamphlet) as (running, _):
        ask(running, prompts[0])
    llm = small(pamphlet)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        assert SessionDir(tmp_path, PLENTY, llm).chains == {}
    with keeping(tmp_path, pamphlet) as (running, _):
        with monkeypatch.context() as patch:
            patch.setattr(module.session, "to_blocks", fail)
            assert ask(running, prompts[0])[1] == 0
        running.llm.engine.pool.clear()
        assert ask(running, prompts[0])[1] == 64
        running.llm.engine.pool.clear()
        (file,) = tmp_path.iterdir()
        file.unlink()
        assert ask(running, prompts[0])[1] == 0
    assert [*tmp_path.iterdir()] == [file], "what somebody removed was not saved again"


def test_sessions_of_another_format_are_left_alone(pamphlet: Model, prompts: list[list[int]], tmp_path: Path):
    with keeping(tmp_path, pamphlet) as (running, _):
        ask(running, prompts[0])
    (other,) = tmp_path.iterdir()
    with keeping(tmp_path, pamphlet, limit=other.stat().st_size - 1, kv="int8-token") as (running, sessions):
        assert sessions.chains == {}
        assert ask(running, prompts[0])[1] == 0
    assert len(list(tmp_path.iterdir())) == 2
    with keeping(tmp_path, pamphlet) as (running, _):
        assert ask(running, prompts[0])[1] == 64


def test_the_least_recently_used_go_first(pamphlet: Model, prompts: list[list[int]], tmp_path: Path):
    with keeping(tmp_path, pamphlet) as (running, _):
        for prompt in prompts[:2]:
            ask(running, prompt)
    for i, file in enumerate(sorted(tmp_path.iterdir())):
        os.utime(file, (i, i))
    one = max(file.stat().st_size for file in tmp_path.iterdir())
    with keeping(tmp_path, pamphlet, limit=int(2.5 * one)) as (running, sessions):
        oldest, pool = next(iter(sessions.sizes)), running.llm.engine.pool
        used = next(prompt for prompt in prompts[:2] if oldest.name.startswith([*pool.prefixes(prompt)][-1][0].hex()))
        assert ask(running, used)[1] == 64  # it is the newest now
        ask(running, prompts[2])
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2.5 * one
    with keeping(tmp_path, pamphlet, limit=int(1.5 * one)) as (running, sessions):
        assert len(sessions.sizes) == 1
        assert ask(running, prompts[2])[1] == 64
        assert ask(running, used)[1] == 0
    with keeping(tmp_path, pamphlet, limit=10) as (running, sessions):
        ask(running, prompts[0])
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_too_large_costs_no_other_its_place(pamphlet: Model, text_ids: list[int], tmp_path: Path):
    llm = small(pamphlet)
    sessions = SessionDir(tmp_path, PLENTY, llm)
    save(sessions, llm, text_ids[:70], text_ids[100:300])
    sizes = sorted(sessions.sizes.values())
    sessions = SessionDir(tmp_path, sizes[1] - 1, llm)  # its codes alone would fit
    assert sorted(sessions.sizes.values()) == sizes[:1]
    save(sessions, llm, text_ids[100:300])
    assert sorted(sessions.sizes.values()) == sizes[:1] == [file.stat().st_size for file in tmp_path.iterdir()]


def test_what_goes_on_while_another_is_saved_is_saved_as_it_is_then(
    pamphlet: Model, prompts: list[list[int]], text_ids: list[int], tmp_path: Path
):
    llm = small(pamphlet)
    sessions = SessionDir(tmp_path, PLENTY, llm)
    longer = text_ids[100:240]  # than the second prompt
    save(sessions, llm, *prompts, meanwhile=lambda: sessions.remember(longer))
    assert [tokens for tokens, _ in sessions.fresh.values()] == [longer]
    save(sessions, llm, longer)
    assert sessions.fresh == {}
    assert len(sessions.chains) == 3


@pytest.mark.parametrize(("grace", "saved"), [(30.0, 3), (0.3, 0)])
def test_the_stop_loses_none_that_the_grace_time_has_room_for(
    grace: float, saved: int, pamphlet: Model, prompts: list[list[int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    begun, go = threading.Event(), threading.Event()
    to_rows, stop = module.session.to_rows, Worker.stop

    def wait(*given: Any) -> Any:
        begun.set()
        go.wait(20)
        return to_rows(*given)

    monkeypatch.setattr(module, "QUIET", 0.05)
    monkeypatch.setattr(module.session, "to_rows", wait)
    monkeypatch.setattr(Worker, "stop", lambda worker: (go.set(), stop(worker)))
    with keeping(tmp_path, pamphlet) as (running, _):
        running.server.service.grace = grace
        for prompt in prompts:
            ask(running, prompt)
        assert begun.wait(20)
        if saved:
            threading.Timer(0.3, go.set).start()  # it is being saved as the server stops
    assert len(list(tmp_path.iterdir())) == saved
    assert ("ended before 3 conversations were saved" in caplog.text) == (saved == 0)


def test_a_refused_prompt_is_no_conversation(pamphlet: Model, tmp_path: Path):
    with keeping(tmp_path, pamphlet) as (running, sessions):
        with pytest.raises(BadRequestError, match="the prompt has 600 tokens"):
            ask(running, [5] * 600)
        running.assert_idle()
        assert sessions.fresh == {}


def test_a_directory_that_cannot_be_is_refused(pamphlet: Model, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OctavoError, match=r"--session-dir .* cannot be used"):
        SessionDir(tmp_path / "file" / "dir", PLENTY, small(pamphlet))
    with pytest.raises(OctavoError, match="prefix cache, and it is turned off"):
        SessionDir(tmp_path, PLENTY, small(pamphlet, prefix_caching=False))


def test_where_nothing_is_saved_a_request_does_not_wait_for_the_engine(
    pamphlet: Model, prompts: list[list[int]], tmp_path: Path
):
    sessions = SessionDir(tmp_path, PLENTY, small(pamphlet))
    asyncio.run(sessions.restore(None, prompts[0]))  # type: ignore[arg-type]  # there is no worker to wait for


def test_more_conversations_than_the_disk_takes_are_not_all_kept(
    pamphlet: Model, text_ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "MOST_FRESH", 3)
    sessions = SessionDir(tmp_path, PLENTY, small(pamphlet))
    for i in range(5):
        sessions.remember(text_ids[i : i + 70])
    sessions.remember(text_ids[4:200])  # goes on with the last
    assert [tokens for tokens, _ in sessions.fresh.values()] == [text_ids[2:72], text_ids[3:73], text_ids[4:200]]


def test_a_size_without_a_directory_is_refused(capsys: pytest.CaptureFixture[str]):
    assert status_of("serve", "--session-dir-size", "1GB") == 2
    assert "--session-dir-size bounds what --session-dir keeps" in capsys.readouterr().err
