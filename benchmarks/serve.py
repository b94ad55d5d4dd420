"""The server under load, four measures on the bundled model.

(a) `storm`: 64 clients stream for two minutes; some leave midway, some at once, some send what is no request. Counted:
    answers by status, anything that was not intended, blocks still held at the end, the slope of the server's memory,
    time to first token.
(b) `throughput`: the same work through the server, streamed to 64 clients, and through LLM.generate, in turn.
(c) `budget`: a KV cache of the same bytes in 16 bits and in others: sessions it holds, sessions that ran, and the time
    for a fixed set of long requests, in turn.
(d) `before`: this server and another commit's, in turn: tokens a second by 64 and by 16 clients, and with 16 the time
    to the first token. It needs the Python of an environment with that commit.

Clients run in a process of their own. The last line is one JSON document.

    OMP_NUM_THREADS=2 python benchmarks/serve.py --out benchmarks/results/serve-zen3.json
    OMP_NUM_THREADS=2 python benchmarks/serve.py --only before --before ../before/.venv/bin/python --rounds 3
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from machine import describe, tell

from octavo import LLM, SamplingParams
from octavo.models.model import BUNDLED

MAIN = ["-c", "from octavo.cli import main; main()"]
TEXT = (BUNDLED / "evaluation.txt").read_text(encoding="utf-8")
SERVED = ["--kv", "int8-token"]
BUDGETED = ("bf16", "int8", "kv8", "k8v4", "kv4")

# --- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def server(*options: str, python: str = sys.executable) -> Iterator[tuple[dict[str, Any], psutil.Process]]:
    command = [python, *MAIN, "serve", "--port", "0", "--json", *options]
    elsewhere = tempfile.gettempdir()  # where Python finds no other octavo than the installed one
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=elsewhere)
    try:
        assert process.stdout
        state = json.loads(process.stdout.readline())
        while True:
            try:
                ask(state, "/health")
                break
            except OSError:
                time.sleep(0.05)
        yield state, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def ask(state: dict[str, Any], path: str) -> Any:
    with urllib.request.urlopen(state["url"] + path, timeout=60) as response:
        return json.load(response)


def client(state: dict[str, Any], kind: str, **job: Any) -> subprocess.Popen[str]:
    """Clients of a kind, in a process of their own."""
    job = {"url": state["url"], "kind": kind, **job}
    command = [sys.executable, str(Path(__file__).with_name("serve_clients.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    json.dump(job, process.stdin)
    process.stdin.close()
    process.stdin = None  # nothing for communicate to flush
    return process


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    return json.loads(out)


# --- measures --------------------------------------------------------------------------------------------------------


def storm(args: argparse.Namespace) -> dict[str, Any]:
    with server(*SERVED, "--max-queue", "44") as (state, process):
        clients = client(state, "storm", clients=args.clients, seconds=args.seconds, text=TEXT[:60_000])
        memory: list[tuple[float, float]] = []
        start = time.monotonic()
        while clients.poll() is None:
            memory.append((time.monotonic() - start, process.memory_info().rss / 2**20))
            time.sleep(0.5)
        counted = result(clients)
        time.sleep(1)
        cache, health = ask(state, "/cache"), ask(state, "/health")
    warm = [point for point in memory if point[0] > args.seconds / 3]
    slope = statistics.linear_regression(*zip(*warm, strict=True)).slope * 60
    first = sorted(counted["first"])
    return {
        "clients": args.clients,
        "seconds": args.seconds,
        "answers": counted["statuses"],
        "unintended": counted["unintended"],
        "blocks_held_at_the_end": cache["blocks_used"],
        "failed_steps": health["failed_steps"],
        "rss_mib": [round(warm[0][1], 1), round(warm[-1][1], 1)],
        "rss_slope_mib_per_minute": round(slope, 2),
        "first_token_seconds": {f"p{q}": round(first[(len(first) - 1) * q // 100], 3) for q in (50, 90, 99)},
        "tokens_per_second": round(counted["tokens"] / args.seconds, 1),
    }


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    llm = LLM(kv="int8-token")
    ratios, rates = [], []
    with server(*SERVED) as (state, _):
        for round_ in range(-1, args.rounds):  # the first warms up
            rng = random.Random(round_)
            starts = [rng.randrange(len(TEXT) - 600) for _ in range(64 if round_ < 0 else args.requests)]
            prompts = [TEXT[at : at + 600] for at in starts]
            params = SamplingParams(max_tokens=64, ignore_eos=True)
            fields = {"max_tokens": 64, "ignore_eos": True, "temperature": 0}

            def own(prompts: list[str] = prompts, params: SamplingParams = params) -> float:
                start = time.perf_counter()
                tokens = sum(len(c.token_ids) for c in llm.generate(prompts, params))
                return tokens / (time.perf_counter() - start)

            def served(prompts: list[str] = prompts, fields: dict[str, Any] = fields) -> float:
                requests = [{"prompt": prompt, **fields} for prompt in prompts]
                done = result(client(state, "work", clients=args.clients, requests=requests))
                assert done["tokens"] == 64 * len(prompts), done["unintended"]
                return done["tokens"] / done["seconds"]

            if round_ % 2:
                through, direct = served(), own()
            else:
                direct, through = own(), served()
            if round_ >= 0:
                ratios.append(through / direct)
                rates.append((through, direct))
    return {
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": args.rounds,
        "tokens_per_second": [round(statistics.median(rate), 1) for rate in zip(*rates, strict=True)],
    }


def before(args: argparse.Namespace) -> dict[str, Any]:
    """The same requests to both servers, in turn; medians, and the range of the rounds' ratios, now over before."""
    found: dict[str, list[tuple[float, float]]] = {}  # of a measure and a round: now, before
    with server(*SERVED) as (this, _), server(*SERVED, python=args.before) as (other, _):
        for round_ in range(-1, args.rounds):  # the first warms up
            rng = random.Random(round_)
            for clients, count in ((64, args.requests // 3), (16, args.requests // 6)):
                starts = [rng.randrange(len(TEXT) - 600) for _ in range(count)]
                fields = {"max_tokens": 64, "ignore_eos": True, "temperature": 0}
                requests = [{"prompt": TEXT[at : at + 600], **fields} for at in starts]
                pair = [this, other] if round_ % 2 else [other, this]
                done = [result(client(state, "work", clients=clients, requests=requests)) for state in pair]
                mine, old = done if round_ % 2 else done[::-1]
                assert mine["tokens"] == old["tokens"] == 64 * count, (mine["unintended"], old["unintended"])
                if round_ < 0:
                    continue
                rates = mine["tokens"] / mine["seconds"], old["tokens"] / old["seconds"]
                found.setdefault(f"tokens_per_second_{clients}_clients", []).append(rates)
                if clients == 16:
                    firsts = statistics.median(mine["first"]), statistics.median(old["first"])
                    found.setdefault("first_token_seconds_16_clients", []).append(firsts)
    rows = {}
    for name, pairs in found.items():
        ratios = [now / then for now, then in pairs]
        now, then = (round(statistics.median(column), 4) for column in zip(*pairs, strict=True))
        spread = [round(min(ratios), 3), round(max(ratios), 3)]
        rows[name] = {"now": now, "before": then, "ratio": round(statistics.median(ratios), 3), "range": spread}
    there = subprocess.check_output([args.before, "-c", "import octavo; print(octavo.__path__[0])"], text=True).strip()
    old = subprocess.check_output(["git", "-C", there, "rev-parse", "--short", "HEAD"], text=True).strip()
    return {"commit_before": old, "rounds": args.rounds, "rows": rows}


def budget(args: argparse.Namespace) -> dict[str, Any]:
    """Long requests, all at once, on caches of the same size."""
    rng = random.Random(0)
    prompts = [TEXT[at : at + 1500] for at in (rng.randrange(len(TEXT) - 1500) for _ in range(args.long))]
    with tempfile.TemporaryDirectory() as work:
        data = ["--calib-dataset", str(BUNDLED / "evaluation.txt")]
        calibrate = ["calibrate", *data, "--calib-samples", "8", "--calib-seqlen", "1024", "--work-dir", work]
        subprocess.run(
            [sys.executable, *MAIN, *calibrate], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        common = ["--kv-cache-memory", args.memory, "--max-batch-size", "32"]
        states: dict[str, dict[str, Any]] = {}
        with ExitStack() as close:
            for name in BUDGETED:
                states[name], _ = close.enter_context(server(*common, "--kv", name, "--calibration", work))
            rows: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "sessions": []} for name in states}
            for round_ in range(args.rounds):
                for name in sorted(states, reverse=bool(round_ % 2)):
                    # Each round its own first words: no prompt is found in the cache of the round before.
                    requests = [
                        {"prompt": f"{round_} {p}", "max_tokens": args.answer, "ignore_eos": True, "temperature": 0}
                        for p in prompts
                    ]
                    clients = client(states[name], "work", clients=len(requests), requests=requests)
                    ran = []
                    while clients.poll() is None:
                        ran.append(ask(states[name], "/cache")["sessions_running"])
                        time.sleep(0.1)
                    done = result(clients)
                    assert done["tokens"] == args.answer * len(requests), done["unintended"]
                    rows[name]["seconds"].append(done["seconds"])
                    rows[name]["sessions"].append(statistics.median([n for n in ran if n]))
    found = []
    for name, state in states.items():
        ratios = [a / b for a, b in zip(rows["bf16"]["seconds"], rows[name]["seconds"], strict=True)]
        found.append({
            "kv": name,
            "cache_bytes": state["cache_bytes"],
            "cache_tokens": state["cache_tokens"],
            "sessions_of_2048": state["cache_tokens"] // 2048,
            "sessions_running": round(statistics.median(rows[name]["sessions"]), 1),
            "seconds": round(statistics.median(rows[name]["seconds"]), 2),
            "faster_than_bf16": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
        })  # fmt: skip
    return {"kv_cache_memory": args.memory, "requests": args.long, "rows": found}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--only", choices=["storm", "throughput", "budget", "before"])
    cli.add_argument("--seconds", type=float, default=120)
    cli.add_argument("--clients", type=int, default=64)
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--requests", type=int, default=192, help="of a round of `throughput`")
    cli.add_argument("--long", type=int, default=32, help="requests of a round of `budget`")
    cli.add_argument("--answer", type=int, default=1000, help="tokens of each of them")
    cli.add_argument("--memory", default="48MiB", help="KV cache of `budget`")
    cli.add_argument("--before", metavar="PYTHON", help="of an environment with the commit that `before` compares with")
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()
    document = {"benchmark": "serve", **describe()}
    for measure in (storm, throughput, budget, *([before] if args.before else [])):
        if args.only in (None, measure.__name__):
            document[measure.__name__] = measure(args)
            print(measure.__name__, json.dumps(document[measure.__name__]), file=sys.stderr)
    tell(document, args.out)


if __name__ == "__main__":
    main()
