"""A replica: the server's own HTTP application, asked through Ray in place of a socket.

Torch is imported where a replica starts: whoever deploys this, and the ingress, need none.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from octavo.serve.limits import Limits, keep_few_shapes

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.types import Message

    from octavo.ray.args import Args
    from octavo.serve.response_store import Kept

logger = logging.getLogger("octavo")
STORE_TIMEOUT = 10.0  # seconds


class Replica:
    """A model behind the routes, in a process of its own."""

    async def __init__(self, args: Args, responses: DeploymentHandle):  # type: ignore[misc]  # Ray waits for it
        from octavo.llm import LLM
        from octavo.serve import logs
        from octavo.serve.app import create_app
        from octavo.serve.server import SWITCH
        from octavo.serve.service import Service
        from octavo.serve.sessions import SessionDir

        logs.start(args.log_prompts, args.log_level, args.log_requests)
        sys.setswitchinterval(SWITCH)
        keep_few_shapes()
        llm = LLM(**args.llm)
        sessions = None
        if args.session_dir is not None:
            sessions = SessionDir(Path(args.session_dir), args.session_dir_bytes, llm, shared=True)
        limits = Limits(args.max_queue, args.timeout, args.max_body)
        names = args.served_model_name or [llm.model.name]
        self.failed = self.ending = False
        self.service = Service(
            llm, names, limits, self._give_up, sessions, args.grace, ignore_unknown=args.ignore_unknown_fields
        )
        keys = args.api_key or os.environ.get("OCTAVO_API_KEY", "").split()
        self.app = create_app(self.service, keys, tuple(args.cors_origin), Shared(responses))
        self.lifespan = self.app.router.lifespan_context(self.app)
        await self.lifespan.__aenter__()
        gc.freeze()

    async def answer(self, key: str, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
        """The messages of ASGI that answer a request; `key` is what it was routed by. Whoever leaves ends it."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        asked, gone = [body], asyncio.Event()

        async def receive() -> Message:
            if asked:
                return {"type": "http.request", "body": asked.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self.app({**scope, "octavo.key": key}, receive, messages.put))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()
            await asyncio.wait({work})
            if error := work.exception():  # it is answered with status 500
                logger.error("a request failed", exc_info=error)

    async def document(self, scope: dict[str, Any]) -> tuple[str, int, list[tuple[bytes, bytes]], bytes]:
        """This replica's name, and its whole answer to a request without a body: status, headers, body."""
        name = serve.get_replica_context().replica_id.unique_id
        start, *parts = [message async for message in self.answer("", scope, b"")]
        return name, start["status"], start["headers"], b"".join(part["body"] for part in parts)

    def check_health(self) -> None:
        """Ray replaces a replica whose engine had to be given up; it may ask one that it has told to end."""
        if self.failed or not (self.ending or self.service.worker.alive):
            raise RuntimeError("the engine failed in every one of its last steps")

    async def __del__(self) -> None:
        """Ray calls it when the last request has ended: conversations are saved, the engine's thread ends."""
        if hasattr(self, "lifespan"):
            self.ending = True
            await self.lifespan.__aexit__(None, None, None)

    def _give_up(self) -> None:
        self.failed = True


class Shared:
    """The Store of all replicas, which is a deployment of its own. While it cannot be reached, answers are not kept."""

    def __init__(self, store: DeploymentHandle):
        self.store = store

    async def add(self, kept: Kept) -> None:
        try:
            await asyncio.wait_for(self.store.add.remote(kept), STORE_TIMEOUT)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("a response is not kept: %s", type(error).__name__)

    async def get(self, id: str) -> Kept | None:
        return await asyncio.wait_for(self.store.get.remote(id), STORE_TIMEOUT)

    async def remove(self, id: str) -> bool:
        return await asyncio.wait_for(self.store.remove.remote(id), STORE_TIMEOUT)
