"""What tests of the native kernels share: each instruction set of this processor in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from octavo.weights import cpu


def isas() -> list[str]:
    return cpu._native.isas() if cpu._native is not None else []


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu._native.isa()
    cpu._native.use(request.param)
    yield request.param
    cpu._native.use(before)
