"""The server as a process: a socket, uvicorn, and what ends it."""

import logging
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import FrameType

import uvicorn

from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.serve.app import create_app
from octavo.serve.connections import BACKLOG, Connection, Connections
from octavo.serve.limits import Limits
from octavo.serve.listening import Tls, is_local
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
        names: Sequence[str] = (),
        limits: Limits | None = None,
        *,
        tls: Tls | None = None,
        api_key: str | Sequence[str] = (),
        cors_origins: tuple[str, ...] = (),
        grace: float = 30.0,
        sessions: SessionDir | None = None,
        ignore_unknown: bool = False,
    ):
        self.sock = sock
        limits = limits or Limits()
        with suppress(ImportError, ValueError):  # else the first JSON schema tells
            llm.grammars.prepare()
        self.connections = Connections(limits)
        self.service = Service(llm, names or [llm.model.name], limits, self._give_up, sessions, grace, ignore_unknown)
        if not api_key and not is_local(sock):
            logger.warning("anyone who reaches %s can use the model: set --api-key", sock.getsockname()[0])
        if tls:
            tls.check()
        app = create_app(self.service, api_key, cors_origins)
        config = uvicorn.Config(
            app,
            log_config=None,  # logs.py has it
            log_level=logging.WARNING,
            access_log=False,
            timeout_graceful_shutdown=grace,  # type: ignore[arg-type]  # asyncio takes parts of a second too
            server_header=False,
            proxy_headers=False,
            loop="asyncio",  # connections.py sets what asyncio's own transports have, and uvloop's have not
            http=partial(Connection, self.connections),  # type: ignore[arg-type]  # it is called like a class
            ws="none",
            backlog=BACKLOG,
            lifespan="on",
            ssl_certfile=tls.certificate if tls else None,
            ssl_keyfile=tls.key if tls else None,
        )
        self.uvicorn = Draining(config)
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


class Draining(uvicorn.Server):
    """uvicorn's, which stops as we want it to: no new requests, then the answers' ends, then the lifespan's. This tells
    of it, and does not raise the signal again: what is stopped has done its work."""

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT  # the second Ctrl-C
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace = self.config.timeout_graceful_shutdown
        logger.info("stopping: answers that are not complete (%d) have %g s", len(self.server_state.tasks), grace)
        await super().shutdown(sockets)
        logger.info("stopped")
