"""The native product of 16-bit weights against torch's float32 product of float32 weights, and where the processor
multiplies pairs of bf16 numbers, as models then do, against torch's bf16 product; by the number of rows.

Shapes are those of a Llama of a billion parameters. Each round takes all in turn, and a loop of float32 multiply-adds
on all threads as the measure of what the processor can do; ratios are of times within a round, and their median is
given. With few rows a round has several layers, so that weights come from memory. Before it is timed, each product is
checked against float64, and each row against itself alone, bit for bit. The last line is one JSON document.

    python benchmarks/products_cpu.py --out benchmarks/results/products-cpu-zen3.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe, tell

from octavo import processor
from octavo.weights import cpu

ROWS = (1, 2, 4, 8, 16, 64, 128, 256, 512, 2048)
SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632), (32000, 2048))  # out, in
MEMORY = 128 << 20  # bytes of 16-bit weights in a round of few rows: several times any cache
FEW = 64
PEAK_SECONDS = 0.02


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def check(panels: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> None:
    found = cpu.multiply_panels(panels, len(weight), x, None)
    exact = (x[:4].bfloat16() if cpu.in_pairs(panels) else x[:4]).double() @ weight.double().T
    assert (found[:4] - exact).norm() <= 1e-5 * exact.norm()
    for row in (0, len(x) - 1):
        assert torch.equal(cpu.multiply_panels(panels, len(weight), x[row : row + 1], None)[0], found[row])


def measure(shape: tuple[int, int], rows: int, rounds: int) -> dict[str, Any]:
    out, columns = shape
    count = max(1, MEMORY // (2 * out * columns)) if rows < FEW else 1
    weights = [torch.randn(out, columns).bfloat16() for _ in range(count)]
    pairs = cpu.multiplies_pairs()
    panels, wide = [cpu.pack_panels(weight, pairs) for weight in weights], [weight.float() for weight in weights]
    x = torch.randn(rows, columns)
    half = x.bfloat16()
    check(panels[0], weights[0], x)
    ways: dict[str, Callable[[], Any]] = {
        "own": lambda: [cpu.multiply_panels(panel, out, x, None) for panel in panels],
        "torch float32": lambda: [torch.mm(x, weight.T) for weight in wide],
    }
    if pairs:
        ways["torch bf16"] = lambda: [F.linear(half, weight) for weight in weights]
    rates: dict[str, list[float]] = {name: [] for name in (*ways, "multiply-adds")}
    operations = 2 * rows * out * columns * count
    for turn in range(rounds + 1):
        for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
            rates[name].append(operations / seconds(way) / 1e9)
        rates["multiply-adds"].append(cpu.peak(PEAK_SECONDS) / 1e9)
    kept = {name: own[1:] for name, own in rates.items()}  # the first round warms up
    ratios = {
        name: median(own / other for own, other in zip(kept["own"], kept[name], strict=True))
        for name in kept
        if name != "own"
    }
    found = {"out": out, "in": columns, "rows": rows, "gflops": {name: median(own) for name, own in kept.items()}}
    numbers = ", ".join(f"{name} {rate:.1f}" for name, rate in found["gflops"].items())
    over = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(f"{rows} rows, {out} × {columns}: GFLOP/s {numbers}; own over {over}", flush=True)
    return found | {"weights_gb_per_s": found["gflops"]["own"] / rows, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if why := cpu.unavailable():
        raise SystemExit(why)
    torch.manual_seed(0)
    document: dict[str, Any] = {
        "machine": describe(), "processor": f"{processor.name()}, {processor.instructions()}", "rounds": args.rounds,
    }  # fmt: skip
    with torch.inference_mode():
        document["products"] = [measure(shape, rows, args.rounds) for rows in args.rows for shape in SHAPES]
    tell(document, args.out)


if __name__ == "__main__":
    main()
