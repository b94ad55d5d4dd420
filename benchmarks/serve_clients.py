"""The clients of serve.py, in a process that imports little: JSON in on stdin, JSON out on stdout."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

MALFORMED: list[tuple[bytes, str, int]] = [  # a body, its type, and the status it must have
    (b"{", "application/json", 400),
    (b'{"prompt": ""}', "application/json", 400),
    (b'{"prompt": "a", "no_such_field": 1}', "application/json", 400),
    (b'{"prompt": "a", "temperature": -1}', "application/json", 400),
    (b'{"prompt": "a", "model": "another"}', "application/json", 404),
    (b'{"prompt": "a"}', "text/plain", 415),
    (b'{"prompt": "' + b"a" * (9 << 20) + b'"}', "application/json", 413),
]


class Client:
    """Requests over plain sockets: the clients share few cores with the server and must cost little."""

    def __init__(self, url: str):
        host, port = url.removeprefix("http://").rsplit(":", 1)
        self.address = (host, int(port))
        self.statuses: Counter[str] = Counter()
        self.first: list[float] = []  # seconds to the first piece
        self.tokens = 0
        self.unintended: list[str] = []

    async def stream(self, leave_after: int | None = None, **fields: Any) -> None:
        """One streamed completion; the client leaves after so many pieces, if told to."""
        content = json.dumps({"stream": True, "stream_options": {"include_usage": True}, **fields}).encode()
        start = time.perf_counter()
        reader, writer = await self._send(content, "application/json")
        try:
            if leave_after == 0:
                self.statuses["left at once"] += 1
                return
            status = await self._status(reader)
            if status != 200:
                self.statuses[str(status)] += 1
                if status != 429:
                    self.unintended.append(f"{status}: {(await reader.read(300))!r}")
                else:
                    await asyncio.sleep(random.uniform(0.2, 1))  # as it says in Retry-After, but sooner
                return
            pieces = 0
            async for line in reader:
                if not line.startswith(b"data: "):
                    continue
                if not pieces:
                    self.first.append(time.perf_counter() - start)
                pieces += 1
                if b'"usage":{' in line:
                    self.tokens += json.loads(line[6:])["usage"]["completion_tokens"]
                if line.startswith(b"data: [DONE]"):
                    self.statuses["200"] += 1
                    return
                if pieces == leave_after:
                    self.statuses["left midway"] += 1
                    return
            self.unintended.append("a stream that ended without [DONE]")
        finally:
            writer.close()

    async def malformed(self) -> None:
        content, kind, expected = random.choice(MALFORMED)
        try:
            reader, writer = await self._send(content, kind)
            status = await self._status(reader)
            writer.close()
        except ConnectionError:  # refused while it was still sending
            status = 413
        self.statuses[f"malformed {status}"] += 1
        if status != expected:
            self.unintended.append(f"{status} in place of {expected}")

    async def _send(self, content: bytes, kind: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self.address)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + content)
        await writer.drain()
        return reader, writer

    async def _status(self, reader: asyncio.StreamReader) -> int:
        return int((await reader.readline()).split()[1])


async def storm_clients(job: dict[str, Any]) -> dict[str, Any]:
    clients = Client(job["url"])
    random.seed(0)
    text = job["text"]
    end = time.monotonic() + job["seconds"]

    async def one() -> None:
        while time.monotonic() < end:
            at = random.randrange(len(text) - 3000)
            fields = {"prompt": text[at : at + random.randrange(40, 3000)], "max_tokens": random.randrange(8, 128)}
            chance = random.random()
            if chance < 0.1:
                await clients.malformed()
            elif chance < 0.2:
                await clients.stream(leave_after=0, **fields)
            elif chance < 0.35:
                await clients.stream(leave_after=random.randrange(1, 20), **fields)
            else:
                await clients.stream(**fields)

    await asyncio.gather(*(one() for _ in range(job["clients"])))
    return vars(clients)


async def work_clients(job: dict[str, Any]) -> dict[str, Any]:
    """A fixed list of requests, as many at a time as there are clients."""
    clients, left = Client(job["url"]), list(reversed(job["requests"]))
    start = time.perf_counter()

    async def one() -> None:
        while left:
            await clients.stream(**left.pop())

    await asyncio.gather(*(one() for _ in range(job["clients"])))
    return {**vars(clients), "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    job = json.load(sys.stdin)
    work = storm_clients if job["kind"] == "storm" else work_clients
    print(json.dumps(asyncio.run(work(job)), default=str))
