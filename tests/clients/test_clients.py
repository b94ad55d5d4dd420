"""Programs as people write them, with the clients that they use, run against the server to their end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import promises
from tests.clients.environments import ready
from tests.clients.running import CLIENTS, PROGRAMS, Client, run
from tests.serve.conftest import Running

ENVIRONMENTS = Path(os.environ.get("OCTAVO_CLIENTS", ".clients"))


def test_openai_s_client_runs_a_typical_program(served: Running):
    assert run([sys.executable, str(PROGRAMS / "openai_sdk.py")], served.url, served.server.service.name) == ""
    served.assert_idle()


@pytest.mark.parametrize("check", promises.CHECKS, ids=lambda check: check.__name__)
def test_what_the_documents_promise_holds(served: Running, check: Callable[[promises.Server], None]):
    check(promises.Server(served.url))
    served.assert_idle()


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.environment)
def test_a_client_runs_a_typical_program(served: Running, client: Client):
    if not ready(ENVIRONMENTS, client.environment):
        pytest.skip(f"{client.package} is not installed: make test-clients")
    assert run(client.command(ENVIRONMENTS), served.url, served.server.service.name) == ""
    served.assert_idle()
