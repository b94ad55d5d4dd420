"""One engine and many threads: whoever waits for an answer steps the engine for all. It has no thread of its own.

Only the thread that has the turn touches the engine. Before a step it does what the others have asked for; what the
step brings lands in everybody's outbox. The others sleep until the step is over, and one of them takes the next turn.
There is one lock, and it is never waited for: a finalizer may run at any point and must not block.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, get_ident
from typing import TypeVar

from octavo.errors import one_line
from octavo.interrupts import held, let_through

logger = logging.getLogger("octavo")
T = TypeVar("T")


class EngineFailed(RuntimeError):
    """A step failed, and with it the engine: what waits for it, now or later, ends with this."""


class EngineTurns:
    """Takes turns at an engine whose `step` is one step of it."""

    def __init__(self, step: Callable[[], object]):
        self.step = step
        self.failure: Exception | None = None  # of the first step that failed
        self._turn = Lock()
        self._holder: int | None = None  # the thread that has it
        self._asked: deque[Callable[[], object]] = deque()
        self._asleep: deque[Lock] = deque()  # each is released to wake who sleeps on it

    def wait(self, ready: Callable[[], object]) -> None:
        """Step, or sleep while others do, until `ready()`. Raises EngineFailed if a step has failed."""
        with held():
            while not ready():
                self.check()
                if not self._take(lambda: None if ready() else self._step()):
                    self._sleep()

    def own(self, function: Callable[[], T]) -> T:
        """What `function` returns, run on this thread between two steps of others; it may be a step itself."""
        result: list[T] = []
        with held():
            while not self._take(lambda: result.append(function())):
                self._sleep()
        return result[0]

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, run before the next step, by whoever makes it. It must be short."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)

        self._asked.append(run)
        with held():
            while not result.done():
                if not self._take():
                    self._sleep()
        return result.result()

    def post(self, function: Callable[[], object]) -> None:
        """Run `function` between two steps: now, or where another thread has the turn, by that one. Never waits."""
        self._asked.append(function)
        with held():
            self._take()

    def fail(self, error: Exception) -> None:
        """Nothing more can be computed. The first reason counts."""
        self.failure = self.failure or error

    def check(self) -> None:
        """Raise EngineFailed if a step has failed."""
        if self.failure is not None:
            name = type(self.failure).__name__
            raise EngineFailed(
                f"a step of the engine failed ({name}: {one_line(self.failure)}), and with it all answers; make "
                "the LLM anew"
            ) from self.failure

    def _step(self) -> None:
        try:
            self.step()
        except Exception as error:
            self.fail(error)

    def _take(self, work: Callable[[], object] = lambda: None) -> bool:
        """With the turn, do what has been asked for, and `work`; False if another thread has the turn."""
        if not self._turn.acquire(blocking=False):
            return False
        self._holder = get_ident()
        try:
            self._do_asked()
            work()
        finally:
            self._holder = None
            self._turn.release()
            if self._asked:  # since, by those who have found the turn taken
                self._take()
            self._wake()
        return True

    def _do_asked(self) -> None:
        while self._asked:
            try:
                self._asked.popleft()()
            except Exception:
                logger.exception("what was asked of the engine could not be done")

    def _sleep(self) -> None:
        """Until the turn is given back."""
        assert self._holder != get_ident(), "a step of the engine cannot wait for the engine"
        woken = Lock()
        woken.acquire()  # until `_wake` releases it
        self._asleep.append(woken)
        if self._turn.locked():  # whoever has it finds the lock when it is given back
            with let_through():
                woken.acquire()

    def _wake(self) -> None:
        while self._asleep:
            try:
                self._asleep.popleft().release()
            except IndexError:  # another thread has woken the last one
                return
