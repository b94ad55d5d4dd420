"""Ctrl-C held back while the engine's state changes, and let through where nothing is half done.

Python runs the handlers of signals in the main thread, between any two instructions; one that raises there, as Ctrl-C's
does, could leave a block that belongs to nobody. In other threads nothing of this is needed, and nothing is done.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

# Those whose handlers raise by custom: KeyboardInterrupt, SystemExit, and the end of a time limit.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)]

_handlers: dict[int, Handler] = {}  # of the signals that are held back
_came: dict[int, FrameType | None] = {}  # meanwhile: each once, as an operating system would keep them


@contextmanager
def held() -> Iterator[None]:
    """Signals that come within the block are handled at its end."""
    if _handlers or current_thread() is not main_thread():
        yield
        return
    try:
        _hold()
        yield
    finally:
        _release()


@contextmanager
def let_through() -> Iterator[None]:
    """Within `held`: signals that have come are handled now, and others as they come, until the end of this block."""
    if not _handlers or current_thread() is not main_thread():
        yield
        return
    try:
        _release()
        yield
    finally:
        _hold()


def _hold() -> None:
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler):
            _handlers[number] = handler
            signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _came[number] = frame


def _release() -> None:
    handlers = dict(_handlers)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _handlers.clear()
    came = dict(_came)
    _came.clear()
    _handle(handlers, came)


def _handle(handlers: dict[int, Handler], came: dict[int, FrameType | None]) -> None:
    """Call the handlers of signals that have come, the others too if one raises."""
    if came:
        number, frame = came.popitem()
        try:
            handlers[number](number, frame)
        finally:
            _handle(handlers, came)
