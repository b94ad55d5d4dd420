"""How the output of a request is sent: streamed as it comes, or whole."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.serve.accounting import Account
from octavo.serve.errors import ApiError, refusal
from octavo.serve.output.bodies import ResponseBody
from octavo.serve.output.choices import ChoiceDelta
from octavo.serve.output.events import dumps
from octavo.serve.service import Service


class GeneratedResponse(Response):
    """The HTTP response that sends it. A client that leaves ends its request at once."""

    def __init__(self, service: Service, account: Account, body: ResponseBody):
        self.service, self.account = service, account
        self.form, self.output = body, body.output
        self.stream = self.output.request.stream
        self.begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._stream(send) if self.stream else self._whole(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.service.metrics.aborted.inc()
                return
            await work  # raises what went wrong
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
        except asyncio.CancelledError:  # the grace time is over
            end = ApiError(503, "the server was stopped before this answer's end")
            await self._refuse(end, scope, receive, send)
        finally:
            for task in (work, gone):
                task.cancel()
            with suppress(asyncio.CancelledError):  # the loop ends too
                await asyncio.gather(work, gone, return_exceptions=True)

    async def _batches(self) -> AsyncGenerator[Iterator[ChoiceDelta]]:
        """What has come, taken into the output as it is read: an event tells of what is before it."""
        account = self.account
        account.id, account.n = self.output.id, self.output.request.n
        async with self.service.job(account.client, self.output) as job:
            account.generations = job.generations
            async for deltas in self.service.batches(job):
                if account.first is None:
                    account.begun, account.first = job.begun, time.monotonic()
                yield map(self.output.take, deltas)
        self.service.metrics.answered(account)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._batches()) as batches:
            async for deltas in batches:
                for _ in deltas:
                    pass
        body = dumps(self.form.whole())
        await self.form.keep()
        self.begun = True
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        """The head waits for the first delta: until then a refusal still has its own status."""
        async with aclosing(self._batches()) as batches:
            async for deltas in batches:
                if events := b"".join(map(self.form.events, deltas)):
                    await self._send(send, events)
        end = self.form.end()
        await self.form.keep()
        await self._send(send, end, more=False)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self.account.refused = error
        if not self.begun:
            await refusal(scope, error)(scope, receive, send)
        elif self.stream:
            await self._send(send, self.form.broken(error), more=False)

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
