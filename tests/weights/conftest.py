"""What tests of the native kernels share: each instruction set of this processor in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from octavo.weights import cpu


@pytest.fixture(params=cpu.extension.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.extension.limited_to(request.param):
        yield request.param
