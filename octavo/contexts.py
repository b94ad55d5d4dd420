"""What holds for a while, for the running thread alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def during(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Within, `variable` has that value; afterwards the one that it had before."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
