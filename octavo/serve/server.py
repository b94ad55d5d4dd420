"""The server as a process: a socket, uvicorn, and what ends it."""

from __future__ import annotations

import logging
import socket

import uvicorn

from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.serve.app import create_app
from octavo.serve.service import Limits, Service
from octavo.serve.sessions import SessionDir


class Server:
    """Serves an LLM on a socket that is open already, so that its port is known."""

    def __init__(
        self,
        llm: LLM,
        sock: socket.socket,
        name: str | None = None,
        limits: Limits | None = None,
        *,
        api_key: str | None = None,
        cors_origins: tuple[str, ...] = (),
        grace: float = 30.0,
        sessions: SessionDir | None = None,
    ):
        self.sock = sock
        self.service = Service(llm, name or llm.model.name, limits or Limits(), self._give_up, sessions, grace)
        app = create_app(self.service, api_key, cors_origins)
        config = uvicorn.Config(
            app,
            log_level=logging.WARNING,
            access_log=False,
            timeout_graceful_shutdown=grace,  # type: ignore[arg-type]  # asyncio takes parts of a second too
            server_header=False,
            lifespan="on",
        )
        self.uvicorn = uvicorn.Server(config)
        self.failed = False

    def run(self) -> None:
        """Serve until a signal: then running answers have the grace time to end. Raises OctavoError if the engine had
        to be given up."""
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


def url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
