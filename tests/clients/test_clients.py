"""What `python -m tests.clients` runs of the clients that are installed here anyway, and what the documents promise."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from tests.clients import promises
from tests.clients.clients import PROGRAMS, run
from tests.serve.conftest import Running


def test_openai_s_client_runs_a_typical_program(served: Running):
    assert run([sys.executable, str(PROGRAMS / "openai_sdk.py")], served.url, served.server.service.name) == ""
    served.assert_idle()


@pytest.mark.parametrize("check", promises.CHECKS, ids=lambda check: check.__name__)
def test_what_the_documents_promise_holds(served: Running, check: Callable[[promises.Server], None]):
    check(promises.Server(served.url))
    served.assert_idle()
