"""Who comes next when many wait: the client that holds the fewest places, so that none waits for all of another's.

A place that is taken is not taken back. So one is kept for each client that was here a moment ago and holds none: who
asks for a little, again and again, need not wait each time until one of those who ask for much has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

KEPT = 30.0  # seconds that a place is kept for a client


class Ticket:
    """One that waits for a place, or has it."""

    def __init__(self, queue: FairQueue, client: str, start: Callable[[], None], priority: int):
        self.queue, self.client, self.start, self.priority = queue, client, start, priority
        self.begun = self.over = False

    def leave(self) -> None:
        """Give the place back, or wait no longer."""
        if not self.over:
            self.over = True
            self.queue.leave(self)


class FairQueue:
    """`places` that are given out one by one. Of one client's tickets the lowest priority number is next, and of these
    the first come; between clients the one that holds the fewest places is next. Belongs to the event loop."""

    def __init__(self, places: int):
        self.places = self.free = places
        self.held: Counter[str] = Counter()
        self.left: dict[str, float] = {}  # when those who hold no place any more gave back their last; oldest first
        self.lines: dict[str, deque[Ticket]] = {}  # of every client that waits; the one served longest ago is first
        self.timer: asyncio.TimerHandle | None = None  # until a place that others wait for need not be kept any longer

    def ask(self, client: str, start: Callable[[], None], priority: int = 0) -> Ticket:
        """Have `start` called once there is a place, which may be at once."""
        ticket = Ticket(self, client, start, priority)
        line = self.lines.setdefault(client, deque())
        at = len(line)
        while at and line[at - 1].priority > priority:
            at -= 1
        line.insert(at, ticket)
        self._give()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        if not ticket.begun:
            self.lines[ticket.client].remove(ticket)
            self._tidy(ticket.client)
            return
        self.free += 1
        self.held[ticket.client] -= 1
        if not self.held[ticket.client]:
            del self.held[ticket.client]
            self._forget()
            self.left[ticket.client] = time.monotonic()
        self._give()

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """A place, once it is there."""
        here = asyncio.Event()
        ticket = self.ask(client, here.set)
        try:
            await here.wait()
            yield
        finally:
            ticket.leave()

    def _give(self) -> None:
        while self.free > 0 and self.lines:
            client = min(self.lines, key=lambda client: self.held[client])
            if self.held[client] and self.free <= self._kept():
                if self.timer is None:
                    wait = next(iter(self.left.values())) + KEPT - time.monotonic()
                    self.timer = asyncio.get_running_loop().call_later(wait, self._give_again)
                return
            ticket = self.lines[client].popleft()
            self.lines[client] = self.lines.pop(client)  # to the end
            self._tidy(client)
            self.free -= 1
            self.held[client] += 1
            self.left.pop(client, None)
            ticket.begun = True
            ticket.start()

    def _give_again(self) -> None:
        self.timer = None
        self._give()

    def _kept(self) -> int:
        """Places that are kept for clients who hold none: at most half of them."""
        self._forget()
        return min(len(self.left), self.places // 2)

    def _forget(self) -> None:
        """Keep no place for those who left long ago."""
        since = time.monotonic() - KEPT
        while self.left and self.left[oldest := next(iter(self.left))] <= since:
            del self.left[oldest]

    def _tidy(self, client: str) -> None:
        if not self.lines[client]:
            del self.lines[client]
