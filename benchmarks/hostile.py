"""A server under requests that mean harm, beside a neighbour who streams.

Each attack comes from an address of its own against `octavo serve` on 127.0.0.1, which may open 1,024 files. Told of
each: what it was answered, in how many seconds, meanwhile the longest time between two tokens of the neighbour's
answers (at most 1 s, or three times the median) and before the first token of one, and how much more memory the server
has afterwards (at most 50 MB). The last line is one JSON document; the exit status is 1 if a bound is not kept.

    OMP_NUM_THREADS=2 python benchmarks/hostile.py --out benchmarks/results/hostile.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

CLI = [sys.executable, "-c", "from octavo.cli import main; main()"]
FILES = 1024  # that the server may have open
DEADLINE, PATIENCE = 20, 5  # seconds
NEIGHBOUR, ATTACKER, OTHER = "127.0.0.1", "127.0.0.2", "127.0.0.3"
MILLION = 1_000_000
HEAD = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n"


def server(log: Path) -> tuple[dict[str, Any], psutil.Process]:
    options = ["--timeout", str(DEADLINE), "--patience", str(PATIENCE), "--session-len", "2048"]
    process = subprocess.Popen(
        [*CLI, "serve", "--kv", "int8-token", "--port", "0", "--json", *options],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
    )
    assert process.stdout
    if not (state := process.stdout.readline()):
        sys.exit(f"the server did not start: {log.read_text()[-2000:]}")
    return json.loads(state), psutil.Process(process.pid)


class Attacks:
    """Each returns what it was answered."""

    def __init__(self, url: str):
        self.host, port = url.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)
        self.began = 0.0  # when the first request was made, and began to be sent

    async def post(self, fields: Any, path: str = "/v1/completions", source: str = ATTACKER, body: bytes = b"") -> str:
        """The status of a request, with the error's words."""
        body = body or json.dumps(fields, separators=(",", ":")).encode()
        self.began = self.began or time.time()
        head = HEAD.format(path, len(body))
        reader, writer = await asyncio.open_connection(self.host, self.port, local_addr=(source, 0))
        try:
            writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
            await writer.drain()
            answer = await reader.read()
        except ConnectionError:
            return "closed"
        finally:
            writer.close()
        status, _, rest = answer.partition(b" ")[2].partition(b" ")
        try:
            said = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["message"]
        except (ValueError, KeyError):
            said = ""
        return f"{status.decode()} {said}".strip()

    async def chat(self, **fields: Any) -> str:
        return await self.post({"messages": [{"role": "user", "content": "a"}], "max_tokens": 40} | fields, CHAT)

    async def schema(self, schema: Any, n: int = 15) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        return await self.chat(response_format=form, n=n)

    def opened(self, source: str = ATTACKER) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.bind((source, 0))
        client.setblocking(False)
        return client

    async def idle(self, count: int = 2000, head: bytes = b"") -> str:
        """Connections that send nothing, or never all of a request."""
        loop, clients = asyncio.get_running_loop(), [self.opened() for _ in range(count)]
        try:
            connecting = [loop.sock_connect(client, (self.host, self.port)) for client in clients]
            await asyncio.wait([asyncio.ensure_future(one) for one in connecting], timeout=10)
            for client in clients if head else ():
                try:
                    client.send(head)
                except OSError:
                    continue
            await asyncio.sleep(PATIENCE + 5)
            return f"{sum(_is_open(client) for client in clients)} of {count} open after {PATIENCE + 5} s"
        finally:
            for client in clients:
                client.close()

    async def unread(self, count: int = 700) -> str:
        """Streams that nobody reads."""
        asked = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True, "logprobs": 5}
        body = json.dumps(asked).encode()
        head = HEAD.format("/v1/completions", len(body))
        loop, clients = asyncio.get_running_loop(), [self.opened() for _ in range(count)]
        try:
            for client in clients:
                await asyncio.wait_for(loop.sock_connect(client, (self.host, self.port)), 10)
                await loop.sock_sendall(client, head.encode() + b"\r\n" + body)
            await asyncio.sleep(DEADLINE + 5)
            return f"{sum(_is_open(client) for client in clients)} of {count} open 5 s after the deadline"
        finally:
            for client in clients:
                client.close()

    async def flood(self, seconds: float = 15, clients: int = 400) -> str:
        """One client that asks without end; another asks for a little, and is answered."""
        end, counted, waits = time.time() + seconds, Counter[str](), []

        async def many() -> None:
            while time.time() < end:
                said = await self.post({"prompt": "Once", "max_tokens": 200, "ignore_eos": True})
                counted[said[:3]] += 1

        async def few() -> None:
            while time.time() < end - 5:
                start = time.time()
                said = await self.post({"prompt": "Once", "max_tokens": 4, "ignore_eos": True}, source=OTHER)
                counted[f"other {said[:3]}"] += 1
                waits.append(time.time() - start)
                await asyncio.sleep(0.2)

        await asyncio.gather(*(many() for _ in range(clients)), few())
        return f"{dict(counted)}; the other waits {statistics.median(waits):.2f} s, at most {max(waits):.2f} s"

    async def tiny_chunks(self, clients: int = 50) -> str:
        """Bodies in chunks of a byte."""
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        chunks = b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n[\r\n" * 300_000

        async def one() -> str:
            reader, writer = await asyncio.open_connection(self.host, self.port, local_addr=(ATTACKER, 0))
            try:
                writer.write(head + chunks)
                return (await reader.readline())[9:12].decode() or "closed"
            except ConnectionError:
                return "closed"
            finally:
                writer.close()

        return str(dict(Counter(await asyncio.gather(*(one() for _ in range(clients))))))

    async def junk(self, requests: int = 3000) -> str:
        """What is no HTTP, one connection after the other."""
        for _ in range(requests):
            _, writer = await asyncio.open_connection(self.host, self.port, local_addr=(ATTACKER, 0))
            writer.write(b"\x00\xff\r\n\r\n")
            writer.close()
        return f"{requests} sent"

    def all(self) -> dict[str, Callable[[], Coroutine[Any, Any, str]]]:
        nested = b"[" * 100_000
        text = {"type": "string"}
        names = [f"p{i}" for i in range(6000)]
        chain = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(3000)}
        recursive = {"type": "object", "properties": {name: {"$ref": "#"} for name in names[:490]}}
        return {
            "prompt: 1,000,000 objects": lambda: self.post({"prompt": [{}] * MILLION}),
            "prompt: 1,000,000 floats": lambda: self.post({"prompt": [1.5] * MILLION}),
            "messages: 1,000,000 numbers": lambda: self.chat(messages=[5] * MILLION),
            "tools: 1,000,000 numbers": lambda: self.chat(tools=[5] * MILLION),
            "logit_bias: 600,000 names": lambda: self.chat(logit_bias=dict.fromkeys(map(str, range(600_000)), "x")),
            "600,000 unknown fields": lambda: self.chat(**dict.fromkeys(map(str, range(600_000)), 1)),
            "2,000 messages, 400,000 unknown fields": lambda: self.chat(
                messages=[dict.fromkeys(names[:200], 1)] * 2000
            ),
            "prompt: 8 MB of text": lambda: self.post({"prompt": "a b " * 2 * MILLION}),
            "100,000 nested [": lambda: self.post(None, body=nested),
            "100,000 nested [ in a prompt": lambda: self.post(
                None, body=b'{"prompt":' + nested + b"]" * 100_000 + b"}"
            ),
            "schema of 3,000 properties, n = 15": lambda: self.schema(
                {"properties": dict.fromkeys(names[:3000], text)}
            ),
            "schema of 6,000 properties, n = 15": lambda: self.schema({"properties": dict.fromkeys(names, text)}),
            "schema, anyOf of 5,000, n = 15": lambda: self.schema(
                {"anyOf": [{"required": [name]} for name in names[:5000]]}
            ),
            "pattern a{100000}, n = 15": lambda: self.schema({"type": "string", "pattern": "a{100000}"}),
            "pattern ^a{100000}$, n = 15": lambda: self.schema({"type": "string", "pattern": "^a{100000}$"}),
            "pattern of 100,000 nested (": lambda: self.schema({"type": "string", "pattern": "(" * 100_000}),
            "multipleOf 15838001": lambda: self.schema({"type": "integer", "multipleOf": 15838001}),
            "3,000 references in a chain": lambda: self.schema({"$defs": chain, "$ref": "#/$defs/d0"}),
            "schema just within the limits, n = 15": lambda: self.schema(recursive),
            "2,000 idle connections": self.idle,
            "2,000 requests that never end": lambda: self.idle(head=b"POST /v1/completions HTTP/1.1\r\nHost:"),
            "700 clients that never read": self.unread,
            "bodies in chunks of a byte": self.tiny_chunks,
            "3,000 connections that speak no HTTP": self.junk,
            "400 connections that ask without end": self.flood,
        }


CHAT = "/v1/chat/completions"


def _is_open(client: socket.socket) -> bool:
    """Whether the server keeps a connection, whatever of its answer is not read."""
    try:
        state = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return False
    return state == 1  # ESTABLISHED


# --- the neighbour, in a process of its own --------------------------------------------------------------------------


def neighbour(url: str) -> None:
    """Stream answers until told to stop; then the time of every token, as JSON."""
    running, times = True, list[tuple[float, bool]]()  # when a token came, and whether it was an answer's first

    def stop(*_: Any) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    asked = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True, "stream": True}
    while running:
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        first = True
        with urllib.request.urlopen(request, timeout=60) as pieces:
            for line in pieces:
                if line.startswith(b"data: {"):
                    if not times:
                        print("begun", flush=True)
                    times.append((time.time(), first))
                    first = False
                if not running:
                    break
    print(json.dumps([*times, (time.time(), first)]))  # a wait that has no end counts too


# --- the table -------------------------------------------------------------------------------------------------------


def memory(process: psutil.Process) -> float:
    return process.memory_info().rss / 1e6


def blocks_used(url: str) -> int:
    with urllib.request.urlopen(f"{url}/cache", timeout=60) as answer:
        return json.load(answer)["blocks_used"]


def measure(url: str, process: psutil.Process, names: list[str], log: Path) -> list[dict[str, Any]]:
    attacker = Attacks(url)
    attacks, rows = attacker.all(), list[dict[str, Any]]()
    watcher = subprocess.Popen([sys.executable, __file__, "--neighbour", url], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout
    watcher.stdout.readline()
    time.sleep(2)
    for name, attack in attacks.items():
        if names and not any(part in name for part in names):
            continue
        attacker.began = 0.0
        before, logged, start = memory(process), log.stat().st_size, time.time()
        said = asyncio.run(attack())
        end = time.time()
        time.sleep(2)
        rows.append(
            {
                "sent": name,
                "answer": said,
                "seconds": round(end - (attacker.began or start), 2),
                "window": (start, time.time()),
                "memory_mb": round(memory(process) - before, 1),
                "blocks": blocks_used(url),
                "log_bytes": log.stat().st_size - logged,
            }
        )
        print(f"{name}: {said[:150]}", file=sys.stderr, flush=True)
    watcher.send_signal(signal.SIGTERM)
    times = json.loads(watcher.communicate(timeout=60)[0])
    gaps = [(before, after - before, first) for (before, _), (after, first) in pairwise(times)]
    quiet = statistics.median(gap for _, gap, first in gaps if not first)
    for row in rows:
        start, end = row.pop("window")
        meanwhile = [(gap, first) for at, gap, first in gaps if at + gap >= start and at <= end]
        row["longest_gap"] = round(max(gap for gap, first in meanwhile if not first), 3)
        row["longest_wait"] = round(max((gap for gap, first in meanwhile if first), default=0), 3)
        row["allowed_gap"] = round(max(1.0, 3 * quiet), 3)
        row["kept"] = row["longest_gap"] <= row["allowed_gap"] and row["memory_mb"] <= 50
    return rows


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--only", nargs="*", default=[], help="parts of the attacks' names")
    cli.add_argument("--out", type=Path)
    cli.add_argument("--neighbour", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.neighbour:
        neighbour(args.neighbour)
        return
    from machine import describe, tell  # brings torch, which the neighbour needs not wait for

    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with tempfile.NamedTemporaryFile("w") as log:
        state, process = server(Path(log.name))
        try:
            rows = measure(state["url"], process, args.only, Path(log.name))
            alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        lines = Path(log.name).read_text(errors="replace").splitlines()
    print(
        f"| sent | answer | seconds | longest gap, s | longest wait, s | memory, MB | log, bytes |\n{'|---' * 7}|",
        file=sys.stderr,
    )
    for row in rows:
        cells = (
            row["sent"],
            row["answer"][:90],
            row["seconds"],
            row["longest_gap"],
            row["longest_wait"],
            row["memory_mb"],
            row["log_bytes"],
        )
        print("| " + " | ".join(map(str, cells)) + " |", file=sys.stderr)
    document = {
        "benchmark": "hostile",
        **describe(),
        "server_alive": alive,
        "longest_log_line": max(map(len, lines), default=0),
        "log_lines": len(lines),
        "rows": rows,
    }
    tell(document, args.out)
    if not alive or not all(row["kept"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
