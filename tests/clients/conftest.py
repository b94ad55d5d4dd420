"""One server for all clients: the bundled model with a template that takes tools."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

from octavo.models.model import Model
from tests.serve.conftest import TOOLED, Running, serving, small


@pytest.fixture(scope="session")
def served(pamphlet: Model) -> Iterator[Running]:
    model = copy.copy(pamphlet)
    model.tokenizer = copy.deepcopy(pamphlet.tokenizer)
    model.tokenizer.chat_template = TOOLED
    with serving(small(model, session_len=2048)) as running:
        yield running
