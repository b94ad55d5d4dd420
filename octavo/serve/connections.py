"""Connections: how many there are, and how long a client may keep one waiting.

What HTTP itself does is uvicorn's. Here each connection knows since when it waits for its client, and once a second all
are looked at: one that sends no request in time, does not read its answer, or is open beyond its answer's deadline is
closed. Beyond the limit each new one costs the client with the most connections its longest idle one.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import resource
import socket
import struct
import sys
import termios
import time
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.serve.limits import Limits

logger = logging.getLogger("octavo")
SPARE_FILES = 256  # open files for all else, and for connections that are accepted in one go
BACKLOG = 128  # connections that the kernel holds ready, all of which asyncio may accept in one go
READ = 1 << 15  # bytes that are read and parsed before other connections have their turn
AT_ONCE = struct.pack("ii", 1, 0)  # of SO_LINGER: what is not delivered is dropped
LATE = 3.0  # seconds after its deadline that an answer, or the refusal in its place, has to be sent


class Connections:
    """All of a server. Belongs to the event loop."""

    def __init__(self, limits: Limits):
        self.limits = limits
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files == resource.RLIM_INFINITY:
            files = limits.max_connections + SPARE_FILES
        self.most = max(1, min(limits.max_connections, files - SPARE_FILES))
        self.open: set[Connection] = set()
        self.of: Counter[str] = Counter()  # by address
        self.timer: asyncio.TimerHandle | None = None

    def add(self, connection: Connection) -> None:
        self.open.add(connection)
        self.of[connection.address] += 1
        self.timer = self.timer or self._again()
        if len(self.open) <= self.most:
            return
        logger.warning("more than %d connections: idle ones are closed (--max-connections)", self.most)
        idle = [one for one in self.open if not one.answering and not one.closing]
        if idle:  # never empty as a rule: the newest is among them
            min(idle, key=lambda one: (-self.of[one.address], one.since)).end()

    def discard(self, connection: Connection) -> None:
        if connection in self.open:
            self.open.remove(connection)
            self.of[connection.address] -= 1
            if not self.of[connection.address]:
                del self.of[connection.address]

    def _look(self) -> None:
        """Close those that keep the server waiting; again in a second, as long as there are any."""
        now = time.monotonic()
        for connection in list(self.open):
            if connection.overdue(now, self.limits):
                connection.end_late()
        self.timer = self._again() if self.open else None

    def _again(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(1, self._look)


class Unchunked(h11.Connection):
    """HTTP that reads no body sent in chunks: a byte in a chunk of its own costs a thousand times what it weighs. The
    app refuses such a request (411) and closes its connection."""

    chunked = False

    def next_event(self) -> Any:
        if self.chunked:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
        return event


class Connection(H11Protocol):
    """One, as uvicorn makes it for each that comes."""

    def __init__(self, connections: Connections, **uvicorn: Any):
        super().__init__(**uvicorn)
        self.conn = Unchunked(h11.SERVER)
        self.room = connections
        self.address = ""
        self.since = time.monotonic()  # when it began to wait for a request
        self.asked = self.since  # when its last request was whole
        self.unread, self.unread_since = 0, 0.0  # bytes that the client has yet to read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = READ  # type: ignore[attr-defined]  # as asyncio's own transports have it
        self.address = self.client[0] if self.client else ""
        self.room.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.room.discard(self)

    def data_received(self, data: bytes) -> None:
        waited = not self.answering
        super().data_received(data)
        if waited and self.answering:
            self.asked = time.monotonic()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        """uvicorn's, once a connection has waited for its next request for too long."""
        self.drop_undelivered()
        super().timeout_keep_alive_handler()

    @property
    def answering(self) -> bool:
        """Whether a request is here whole, and its answer not yet sent."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    @property
    def closing(self) -> bool:
        return self.transport.is_closing()

    def overdue(self, now: float, limits: Limits) -> bool:
        """Whether it has kept the server waiting for too long."""
        unread = self.transport.get_write_buffer_size()
        if not unread or unread < self.unread:
            self.unread_since = now
        self.unread = unread
        if unread and now - self.unread_since > limits.patience:
            return True
        if unread or self.answering:
            return now - self.asked > limits.timeout + LATE
        return now - self.since > limits.patience

    def end(self) -> None:
        """Close it at once, whatever its client has yet to read."""
        if self.conn.our_state is not h11.ERROR and not self.unread and not self.answering:
            self.transport.close()
        else:
            self.transport.abort()

    def end_late(self) -> None:
        """Close one that has kept the server waiting."""
        self.drop_undelivered()
        self.end()

    def drop_undelivered(self) -> None:
        """If the system holds data that the client does not read, have it dropped when the connection is closed, and
        the client told so: else the connection would stay with the system until the client reads."""
        sock = self.transport.get_extra_info("socket")
        if sock.fileno() >= 0 and int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
