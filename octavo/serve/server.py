"""The server as a process: a socket, uvicorn, and what ends it."""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import uvicorn

from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.serve.app import create_app
from octavo.serve.connections import BACKLOG, Connection, Connections
from octavo.serve.limits import Limits
from octavo.serve.service import Service
from octavo.serve.sessions import SessionDir

# Seconds after which a busy thread lets another run. The engine's needs the interpreter hundreds of times in a step:
# with Python's 5 ms a busy event loop would make each step last seconds.
SWITCH = 0.0005
logger = logging.getLogger("octavo")


class Server:
    """Serves an LLM on a socket that is open already, so that its port is known."""

    def __init__(
        self,
        llm: LLM,
        sock: socket.socket,
        name: str | None = None,
        limits: Limits | None = None,
        *,
        api_key: str | Sequence[str] = (),
        cors_origins: tuple[str, ...] = (),
        grace: float = 30.0,
        sessions: SessionDir | None = None,
    ):
        self.sock = sock
        limits = limits or Limits()
        with suppress(ImportError, ValueError):  # else the first JSON schema tells
            llm.grammars.prepare()
        self.connections = Connections(limits)
        self.service = Service(llm, name or llm.model.name, limits, self._give_up, sessions, grace)
        if not api_key and not _is_loopback(sock):
            logger.warning("anyone who reaches %s can use the model: set --api-key", url(sock))
        app = create_app(self.service, api_key, cors_origins)
        config = uvicorn.Config(
            app,
            log_config=None,  # logs.py has it
            log_level=logging.WARNING,
            access_log=False,
            timeout_graceful_shutdown=grace,  # type: ignore[arg-type]  # asyncio takes parts of a second too
            server_header=False,
            proxy_headers=False,
            http=partial(Connection, self.connections),  # type: ignore[arg-type]  # it is called like a class
            ws="none",
            backlog=BACKLOG,
            lifespan="on",
        )
        self.uvicorn = uvicorn.Server(config)
        self.failed = False

    def run(self) -> None:
        """Serve until a signal: then running answers have the grace time to end. Raises OctavoError if the engine had
        to be given up."""
        sys.setswitchinterval(SWITCH)
        self.uvicorn.run(sockets=[self.sock])
        if self.failed:
            raise OctavoError("the engine failed in every one of its last steps: see the log above")

    def stop(self) -> None:
        self.uvicorn.should_exit = True

    def _give_up(self) -> None:
        self.failed = True
        self.stop()


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or error
        raise OctavoError(f"{host}:{port} cannot be served: {reason}; choose another --host or --port") from None
    return sock


def _is_loopback(sock: socket.socket) -> bool:
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
