"""Servers in a thread on a port of their own, and the real client of OpenAI."""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from openai import OpenAI

from octavo import LLM
from octavo.models.model import Model
from octavo.serve.listening import bind, url
from octavo.serve.server import Server
from tests.conftest import wait_until

TOOLED = """{% if tools %}<|user|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% for c in m.get('tool_calls', []) %}
{{- c.function.name }}({{ c.function.arguments.city }}){% endfor %}<|end|>{% endfor %}<|assistant|>"""


@dataclass
class Running:
    """A server that runs."""

    server: Server
    url: str

    @property
    def llm(self) -> LLM:
        return self.server.service.llm

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def assert_idle(self) -> None:
        """Soon nothing runs, waits or holds a block."""
        wait_until(lambda: not self.llm.engine.busy and self.server.service.admitted == 0)
        self.llm.engine.scheduler.check()
        assert not self.llm.engine.pool.groups[0].used
        assert self.llm.begun == []


@contextmanager
def serving(llm: LLM, sock: socket.socket | None = None, **options: Any) -> Iterator[Running]:
    with sock or bind("127.0.0.1", 0) as bound:
        server = Server(llm, bound, **options)
        address = url(bound)  # before it is closed
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: server.uvicorn.started)
            yield Running(server, address)
        finally:
            server.stop()
            thread.join(30)
    assert not thread.is_alive(), "the server did not stop"


def small(model: Model, **more: Any) -> LLM:
    return LLM(model, kv="fp32", **{"session_len": 512, "max_batch_size": 4, "max_batch_tokens": 128} | more)


@pytest.fixture(scope="session")
def shared(pamphlet: Model) -> Iterator[Running]:
    with serving(small(pamphlet)) as running:
        yield running


@pytest.fixture(scope="session")
def tooled(pamphlet: Model) -> Iterator[Running]:
    """A server whose model's template takes tools."""
    with serving(small(with_tools(pamphlet), session_len=1024)) as running:
        yield running


def with_tools(model: Model) -> Model:
    """The model with a template that takes tools."""
    model, tokenizer = copy.copy(model), copy.deepcopy(model.tokenizer)
    model.tokenizer = tokenizer
    tokenizer.chat_template = TOOLED
    return model


@pytest.fixture
def running(shared: Running) -> Iterator[Running]:
    """The server that most tests share; each leaves it as it found it."""
    yield shared
    shared.assert_idle()


@pytest.fixture
def client(running: Running) -> OpenAI:
    return running.client()


@contextmanager
def saying(llm: LLM, text: str) -> Iterator[None]:
    """Within it the model wants to say `text`, token by token, and then to end; what its answer is held to still holds.
    For one answer at a time. Special tokens may be written by their names."""
    run = llm.engine.runner.run
    ends = min(llm.model.eos_ids)
    wanted = [*llm.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def wish(batch: Any) -> Any:
        logits = run(batch)
        if len(logits):
            logits = torch.zeros(logits.shape)
            logits[:, wanted.pop(0) if wanted else ends] = 50.0
        return logits

    llm.engine.runner.run = wish  # type: ignore[method-assign]
    try:
        yield
    finally:
        llm.engine.runner.run = run  # type: ignore[method-assign]
