"""One server for all clients: the bundled model with a template that takes tools."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from octavo.models.model import Model
from tests.serve.conftest import Running, serving, small, with_tools


@pytest.fixture(scope="session")
def served(pamphlet: Model) -> Iterator[Running]:
    with serving(small(with_tools(pamphlet), session_len=2048)) as running:
        yield running
