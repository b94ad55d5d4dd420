"""The memory table of the page this project follows, recomputed, and the same measured on a model that fits here.

internlm-chat-7b at 2048 tokens a session takes more than many machines have, so its table is computed from the geometry
and set beside the page's own numbers. What can be measured is measured: the same layers, fewer of them, with random
weights; and the bundled model.

    python benchmarks/memory.py    # writes docs/MEMORY.md, its picture and benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from machine import describe

from octavo.cli.tables import mib
from octavo.cli.tables.memory import notes
from octavo.devices import device_of
from octavo.measure.memory.costs import Cost, costs, own_kind, weight_kinds
from octavo.measure.memory.points import Point, points, saved
from octavo.measure.memory.process import Source
from octavo.measure.report.picture import draw_growth
from octavo.models.geometry import Geometry
from octavo.models.model import BUNDLED
from octavo.quant.format import KVFormat

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "benchmarks" / "geometries" / "internlm-chat-7b.json"
CONTEXT = 2048
PAGE = {8: (22337, 18241), 16: (30593, 22369), 32: (47073, 30625), 48: (63553, 38881)}  # MiB, fp16 and int8, as printed
CPU = torch.device("cpu")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def the_page(geometry: Geometry, theory: Sequence[Cost]) -> str:
    """The page's totals beside weights and cache as computed; what is left is the page's rest."""
    fp16, int8 = theory

    def row(batch: int) -> list[str]:
        page, ours = PAGE[batch], [(geometry.weights + cost.cache(batch)) / 2**20 for cost in (fp16, int8)]
        sides = [(f"{seen:,}", f"{own:,.0f}", f"{seen - own:,.0f}") for seen, own in zip(page, ours, strict=True)]
        return [f"{batch}", *sides[0], *sides[1], f"{page[0] - page[1]:,}", mib(fp16.cache(batch) - int8.cache(batch))]

    head = ["batch", "fp16, page", "computed", "rest", "int8, page", "computed", "rest", "saved, page", "computed"]
    return table(head, map(row, PAGE))


def measured(found: Sequence[Point]) -> str:
    def row(point: Point) -> list[str]:
        of_cache, in_total = saved(point, found)
        sizes = (mib(size) for size in (point.weights, point.cache, point.rest, point.total))
        savings = ("", "") if point.format == found[0].format else (mib(in_total), mib(of_cache))
        return [f"{point.batch}", point.format, *sizes, *savings, point.how]

    head = ["batch", "KV", "weights", "KV cache", "the rest", "total", "saved", "saved by theory", "how"]
    return table(head, map(row, found))


def tell(point: Point) -> None:
    print(f"{point.batch} × {point.format} {point.how}: {mib(point.total)} MiB", file=sys.stderr)


def run(path: Path, names: Sequence[str], load_format: str, seconds: float) -> list[Point]:
    geometry = Geometry.trace(path)
    theory = costs(geometry, [KVFormat.parse(name) for name in names], CONTEXT, device_of(CPU).memory())
    source = Source(path, load_format=load_format, fill_seconds=seconds)
    return points(theory, list(PAGE), CONTEXT, {own_kind(geometry): source}, tell)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--layers", type=int, default=2, help="of the 32, in the measurement")
    cli.add_argument("--fill-seconds", type=float, default=20, help="that the model may fill sessions at each point")
    args = cli.parse_args()

    geometry = Geometry.trace(CONFIG)
    formats = [KVFormat.parse(name) for name in ("fp16", "int8")]
    theory = costs(geometry, formats, CONTEXT, 80 << 30)
    every = costs(geometry, formats, CONTEXT, 80 << 30, list(weight_kinds(geometry)))
    draw_growth(every, 80 << 30, CONTEXT, CONFIG.stem, ROOT / "docs" / "memory-growth.svg")
    with tempfile.TemporaryDirectory() as directory:
        small = Path(directory) / CONFIG.name
        small.write_text(json.dumps(json.loads(CONFIG.read_text()) | {"num_hidden_layers": args.layers}))
        scaled = run(small, ("fp16", "int8"), "dummy", args.fill_seconds)
    bundled = run(BUNDLED, ("bf16", "int8"), "auto", args.fill_seconds)

    machine = describe()
    session, half = (mib(cost.session) for cost in theory)
    (ROOT / "docs" / "MEMORY.md").write_text(f"""# Memory before and after

Written by `python benchmarks/memory.py`. All numbers are MiB; every session holds {CONTEXT:,} tokens.

## internlm-chat-7b: the page's table

*Page*: as LMDeploy's page on KV int8 printed it. *Computed*: {mib(geometry.weights)} of
weights and {session} (fp16) or {half} (int8) for each session, from the model's geometry; the two saved columns are
differences of totals and of caches. *Rest*: what the page had beside these. No run of this model was made here.

{the_page(geometry, theory)}

    octavo memory --config benchmarks/geometries/internlm-chat-7b.json --weights fp16,int4

![Memory over sessions: fp16, 4-bit weights, int8 KV cache, both](memory-growth.svg)

    octavo plan --config benchmarks/geometries/internlm-chat-7b.json --memory 80GiB --kv fp16,int8 \\
        --plot docs/memory-growth.svg

## {args.layers} of its 32 layers, measured

Random weights, all else equal. The rest differs by some 80 MiB from process to process. {machine["processor"]},
threads: {machine["threads"]}, torch {machine["torch"]}, {machine["date"]}.

{measured(scaled)}

{" ".join(notes(scaled, CONTEXT, "cpu"))}

## pamphlet, measured

The bundled model, whose cache is small beside the process, and the process's own memory varies by some 15 MiB.

{measured(bundled)}

{" ".join(notes(bundled, CONTEXT, "cpu"))}
""")
    document = {
        "benchmark": "memory",
        **machine,
        "context": CONTEXT,
        "page": {batch: {"fp16": fp16, "int8": int8} for batch, (fp16, int8) in PAGE.items()},
        "computed": [
            {"batch": batch, "format": cost.format, "weights": geometry.weights, "cache": cost.cache(batch)}
            for batch in PAGE
            for cost in theory
        ],
        "layers": args.layers,
        "scaled": [point.document() for point in scaled],
        "pamphlet": [point.document() for point in bundled],
    }
    (ROOT / "benchmarks" / "results" / "memory.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
