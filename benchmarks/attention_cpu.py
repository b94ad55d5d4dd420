"""The CPU kernels against torch's own attention, against our 16-bit kernel, and against the memory's speed.

One layer, block tables random, queries in the type that this processor computes in, raw rows in bf16. Decode: one new
token for each sequence. torch's attention gets contiguous K and V, in the best call there is: bf16 or float32, with
`enable_gqa`, with the query heads of a group as rows, or as two products and a softmax; a plain streaming read sums the
bytes of the same blocks through the same table. Prefill: many new tokens of one sequence, the last of its context,
against torch's attention of the same. In each round every contestant runs in turn; reported is the median over rounds
of the ratio within a round, with its range. The last line is one JSON document.

    python benchmarks/attention_cpu.py --out benchmarks/results/attention-cpu-zen3.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe, tell
from torch import Tensor

from octavo.attention import AttentionSpec, attend, cpu
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.store import KVCache
from octavo.quant.calibration import Calibration, Header
from octavo.quant.format import KVFormat

DIM = 128
CASES = [  # batch, tokens, query heads, KV heads
    (8, 4096, 32, 8),
    (8, 4096, 32, 32),
    (1, 32768, 32, 8),
    *((batch, tokens, 32, 8) for batch in (1, 8, 32) for tokens in (64, 512, 2048, 8192)),
]
PREFILLS = [(4096, 4096), (512, 4096)]  # new tokens, tokens
BLOCK = 64
FORMATS = ("bf16", "int8", "int8-token", "kv8", "int4-token", "kv4")
COMPUTED = torch.float32 if cpu.exact else torch.bfloat16


class Sequence:
    def __init__(self, number: int, tokens: int, new: int, blocks: list[int], span: int):
        self.tokens, self.num_cached, self.tables = [0] * tokens, tokens - new, [blocks]
        self.first_page = number * (1 + span // BLOCK)
        self.ring = self.first_page + 1


class Contestant:
    """Attention of the last `new` tokens of each sequence, in one format, over caches that are full."""

    def __init__(self, name: str, batch: int, tokens: int, heads: int, kv_heads: int, new: int = 1):
        blocks, format = -(-tokens // BLOCK), KVFormat.parse(name)
        shape = LayerShape(kv_heads, DIM, DIM, dtype=torch.bfloat16)
        values = {"min": -5.0, "max": 5.0, "mean": 0.0, "std": 1.0, "reader": 1.0}
        side = {name: torch.full((kv_heads, DIM), value) for name, value in values.items()}
        calibration = Calibration(Header("", "", 0, 0, 0, (0, 0)), [{"k": side, "v": side}])
        table = torch.randperm(batch * blocks).view(batch, blocks)
        self.cache = KVCache(
            plan_layers([shape], format, calibration),
            batch * blocks,
            Layout(order="tiles"),
            raw_pages=batch * (1 + format.edges // BLOCK),
        )
        self.spec = AttentionSpec(shape, heads, DIM**-0.5)
        for store in (*self.cache.stores, *self.cache.raw_stores):  # codes and scales of plausible rows, in any order
            if store.codec.kind == "raw":
                store.codes.copy_(torch.randn(store.codes.shape))
            else:
                store.codes.copy_(torch.randint(-100, 100, store.codes.shape))
            if store.scales is not None:
                store.scales.fill_(120)
        work = [(Sequence(i, tokens, new, row.tolist(), format.edges), new) for i, row in enumerate(table)]
        self.batch = Batch.build(work, BLOCK, span=format.edges)
        self.q = torch.randn(batch * new, heads, DIM, dtype=COMPUTED)
        self.kv = torch.randn(2, batch * new, kv_heads, DIM, dtype=COMPUTED)

    def __call__(self) -> None:
        attend(self.spec, self.cache.layers[0], self.q, *self.kv, self.batch)


def torch_attention(
    batch: int, tokens: int, heads: int, kv_heads: int, new: int = 1
) -> dict[str, Callable[[], Tensor]]:
    """The calls that torch offers for it, by name. With one query a group of query heads may stand as rows."""
    causal = 1 < new == tokens
    seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new) if 1 < new < tokens else None
    grouped = heads != kv_heads
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, dtype in {"bf16": torch.bfloat16, "float32": torch.float32}.items():
        q = torch.randn(batch, heads, new, DIM, dtype=dtype)
        k, v = torch.randn(2, batch, kv_heads, tokens, DIM, dtype=dtype)
        rows = q.view(batch, kv_heads, heads // kv_heads, DIM) if new == 1 else None
        calls |= {f"torch_{name}_{call}": run for call, run in _calls(q, k, v, rows, seen, causal, grouped).items()}
    return calls


def _calls(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, seen: Tensor | None, causal: bool, grouped: bool
) -> dict[str, Callable[[], Tensor]]:
    calls: dict[str, Callable[[], Tensor]] = {
        "gqa": lambda: F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, enable_gqa=grouped)
    }
    if rows is not None:
        calls["matmul"] = lambda: ((rows * DIM**-0.5) @ k.mT).softmax(-1) @ v
        if grouped:
            calls["rows"] = lambda: F.scaled_dot_product_attention(rows, k, v)
    return calls


def add_best(results: list[dict[str, float]]) -> str:
    """Give each round torch's best call as "torch"; returns which one is best over all."""
    calls = [name for name in results[0] if name.startswith("torch_")]
    best = min(calls, key=lambda name: statistics.median(result[name] for result in results))
    for result in results:
        result["torch"] = result[best]
    return best


def streaming_read(contestant: Contestant) -> Callable[[], None]:
    """Reads each block of the contestant's codes once, in the order of its table."""
    stores = contestant.cache.stores
    table = contestant.batch.block_table.flatten()

    def run() -> None:
        for store in stores:
            cpu.stream(store, table)

    return run


def seconds(run: Callable[[], Any], least: float) -> float:
    """Median of single runs, repeated for at least that many seconds."""
    times: list[float] = []
    while sum(times) < least or not times:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rounds_of(contestants: dict[str, Callable[[], Any]], rounds: int, least: float) -> list[dict[str, float]]:
    """Seconds of each contestant in each round."""
    for run in contestants.values():
        run()
    return [{name: seconds(run, least) for name, run in contestants.items()} for _ in range(rounds)]


def ratio(results: list[dict[str, float]], slow: str, fast: str) -> dict[str, Any]:
    values = sorted(result[slow] / result[fast] for result in results)
    return {"median": round(statistics.median(values), 3), "range": [round(values[0], 3), round(values[-1], 3)]}


def milliseconds(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(1e3 * statistics.median(result[name] for result in results), 4) for name in results[0]}


def decode(case: tuple[int, int, int, int], rounds: int, least: float) -> dict[str, Any]:
    contestants: dict[str, Callable[[], Any]] = {name: Contestant(name, *case) for name in FORMATS}
    contestants["read"] = streaming_read(contestants["int8"])  # type: ignore[arg-type]
    contestants |= torch_attention(*case)
    results = rounds_of(contestants, rounds, least)
    best = add_best(results)
    return {
        **dict(zip(("batch", "tokens", "heads", "kv_heads"), case, strict=True)),
        "ms": milliseconds(results),
        "best_torch": best,
        "int8_over_torch": ratio(results, "torch", "int8"),
        "int8_share_of_streaming_read": ratio(results, "read", "int8"),
        "int8_over_bf16": ratio(results, "bf16", "int8"),
        "int8_token_over_int8": ratio(results, "int8", "int8-token"),
        "int4_token_over_int8": ratio(results, "int8", "int4-token"),
        "kv8_over_int8_token": ratio(results, "int8-token", "kv8"),
        "kv4_over_int4_token": ratio(results, "int4-token", "kv4"),
    }


def prefill(new: int, tokens: int, rounds: int) -> dict[str, Any]:
    contestants: dict[str, Callable[[], Any]] = {name: Contestant(name, 1, tokens, 32, 8, new) for name in FORMATS}
    contestants |= torch_attention(1, tokens, 32, 8, new)
    results = rounds_of(contestants, rounds, 0)
    best = add_best(results)
    return {
        "new_tokens": new,
        "tokens": tokens,
        "heads": 32,
        "kv_heads": 8,
        "ms": milliseconds(results),
        "best_torch": best,
        "int8_over_torch": ratio(results, "torch", "int8"),
        **{f"{name.replace('-', '_')}_over_bf16": ratio(results, "bf16", name) for name in FORMATS[1:]},
    }


def summary(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value['median']:.2f}" for key, value in row.items() if "median" in str(value))


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=7)
    cli.add_argument("--seconds", type=float, default=0.1, help="least time of each run of a round")
    cli.add_argument("--isa", help="another instruction set than the best")
    cli.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    cli.add_argument("--prefills", type=int, default=len(PREFILLS), help="only the first so many")
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()

    torch.manual_seed(0)
    assert cpu.unavailable() is None, cpu.unavailable()
    if args.isa:
        cpu._native.use(args.isa)
    rows, prefills = [], []
    for case in CASES[: args.cases]:
        rows.append(decode(case, args.rounds, args.seconds))
        print(f"decode {case}: {summary(rows[-1])}   {rows[-1]['ms']}", flush=True)
    for new, tokens in PREFILLS[: args.prefills]:
        prefills.append(prefill(new, tokens, args.rounds))
        print(f"prefill {new} of {tokens}: {summary(prefills[-1])}   {prefills[-1]['ms']}", flush=True)
    document = {
        "benchmark": "attention_cpu",
        **describe(),
        "isa": cpu._native.isa(),
        "rounds": args.rounds,
        "rows": rows,
        "prefill": prefills,
    }
    tell(document, args.out)


if __name__ == "__main__":
    main()
