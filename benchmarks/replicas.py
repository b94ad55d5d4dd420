"""Conversations over replicas on one machine: routed by their prefixes, and at random.

    python benchmarks/replicas.py [--replicas 4] [--conversations 32] [--turns 4] [--at-once 4] [--out FILE]

All conversations share a system message; each has a text of its own of about 300 tokens, and every turn adds the answer
and a question. All have their first turn, then all their second: between two turns of one are those of the others.
Measured from outside: the share of prompt tokens found in the cache, and the time from a request to its first text.

(Not `ray.py`: scripts of this folder, and Ray's own workers, would find that for Ray itself.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
from machine import describe
from ray import serve

from octavo.models.model import BUNDLED
from octavo.ray import Args, app
from octavo.ray.cluster import cluster

PORT = 8931
URL = f"http://127.0.0.1:{PORT}"
SYSTEM = "You answer questions about a text in one short sentence, and you say so where the text does not tell. " * 4
LETTERS = 1200  # of each conversation's own text
ANSWER = 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("replicas", 4), ("conversations", 32), ("turns", 4), ("at-once", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "replicas.json")
    options = parser.parse_args()
    rows = []
    with cluster("local"):
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        for route in ("random", "prefix"):
            llm = {"dtype": "fp32", "kv": "kv8", "device": "cpu", "session_len": 1024}
            args = Args(llm=llm, replicas=options.replicas, cpus=0.1, route=route, log_requests=False)
            serve.run(app(args), route_prefix="/")
            rows.append({"route": route, **measure(options)})
            print(json.dumps(rows[-1]), flush=True)
            serve.delete("default")
        serve.shutdown()
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    document = {"machine": describe(), "model": "pamphlet", **asked, "rows": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(rows))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    text = (BUNDLED / "evaluation.txt").read_text(encoding="utf-8")
    starts = [i * (len(text) - LETTERS) // options.conversations for i in range(options.conversations)]
    said = [[{"role": "system", "content": SYSTEM}] for _ in starts]
    for i in range(options.replicas):  # so that no first step is measured
        ask([{"role": "user", "content": f"{i} warm up"}])
    first: list[list[float]] = []  # by turn, seconds
    begun = time.perf_counter()
    with ThreadPoolExecutor(options.at_once) as pool:
        for turn in range(options.turns):

            def step(i: int, turn: int = turn) -> float:
                about = text[starts[i] : starts[i] + LETTERS] if turn == 0 else ""
                said[i].append({"role": "user", "content": f"{about}\nQuestion {turn + 1}: what happens next?"})
                seconds, answer = ask(said[i])
                said[i].append({"role": "assistant", "content": answer})
                return seconds

            first.append(list(pool.map(step, range(options.conversations))))
    seconds = time.perf_counter() - begun
    cache = httpx.get(f"{URL}/cache", timeout=60).json()
    later = sorted(one for turn in first[1:] for one in turn)
    return {
        "prefix_hits": cache["prefix_hit_tokens"] / cache["prefix_query_tokens"],
        "prompt_tokens": cache["prefix_query_tokens"],
        "first_turn_ttft_ms": 1000 * statistics.mean(first[0]),
        "later_ttft_ms": 1000 * statistics.mean(later),
        "later_ttft_p50_ms": 1000 * later[len(later) // 2],
        "later_ttft_p99_ms": 1000 * later[min(len(later) - 1, int(0.99 * len(later)))],
        "seconds": seconds,
        "by_replica": [one["prefix_query_tokens"] for one in cache["replicas"]],
    }


def ask(messages: list[dict[str, str]]) -> tuple[float, str]:
    """Seconds to the first text of an answer, and the answer."""
    body = {"messages": messages, "max_tokens": ANSWER, "temperature": 0, "stream": True, "ignore_eos": True}
    begun, first, text = time.perf_counter(), 0.0, ""
    with httpx.stream("POST", f"{URL}/v1/chat/completions", json=body, timeout=300) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begun
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    return first, text


def table(rows: list[dict[str, Any]]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "routing": lambda row: row["route"],
        "prompt tokens found": lambda row: f"{row['prefix_hits']:.1%}",
        "first turn, ms": lambda row: f"{row['first_turn_ttft_ms']:.0f}",
        "later turns, ms": lambda row: f"{row['later_ttft_ms']:.0f}",
        "their median": lambda row: f"{row['later_ttft_p50_ms']:.0f}",
        "their p99": lambda row: f"{row['later_ttft_p99_ms']:.0f}",
        "all, s": lambda row: f"{row['seconds']:.1f}",
    }
    lines = [list(columns), ["---"] * len(columns), *([show(row) for show in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
