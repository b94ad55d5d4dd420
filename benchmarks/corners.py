"""The page's combination on real models: 16-bit and 4-bit weights, each with a 16-bit cache, kv8 and kv4.

`octavo quantize` writes each model with 4-bit weights into --work-dir, unless it is there; then `octavo accuracy` reads
a text in all corners in lockstep, in float32: what the weights cost, and what the cache adds to them. Rows of a model
are replaced in --out.

Calibrations go beside the models, so MODEL must be writable.

    python benchmarks/corners.py MODEL … --data ../shared/data/text --work-dir DIR --out benchmarks/results/corners.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from machine import describe, here
from over_models import keep, kept, options
from tasks import run

Document = dict[str, Any]


def quantized(model: Path, args: argparse.Namespace) -> tuple[Path, float | None]:
    """The model with 4-bit weights, and the seconds that it took to make it, if it was made now."""
    directory = args.work_dir / f"{model.name}-awq"
    if directory.is_dir():
        return directory, None
    start = time.perf_counter()
    run("quantize", model, "--work-dir", directory, "--calib-dataset", "ptb", "--data-dir", args.data,
        "--budget", args.budget, "--dtype", args.dtype)  # fmt: skip
    return directory, time.perf_counter() - start


def calibrate(model: Path, args: argparse.Namespace, *more: str) -> None:
    """Beside the model, unless it is there: each kind of weights has its own."""
    if not (model / "kv_calibration.safetensors").is_file():
        run("calibrate", model, *more, "--calib-dataset", "ptb", "--data-dir", args.data,
            "--calib-samples", args.samples, "--calib-seqlen", args.seqlen)  # fmt: skip


def measure(model: Path, four: Path, args: argparse.Namespace) -> list[Document]:
    calibrate(model, args)
    calibrate(four, args, "--model-format", "awq")
    found = json.loads(
        run("accuracy", four, "--model-format", "awq", "--dtype", "fp32", "--baseline", model, "--kv", args.kv,
            "--text", args.text, "--data-dir", args.data, "--windows", args.windows, "--window", args.window,
            "--answers", 0, "--json")
    )  # fmt: skip
    alone = {(row["weights"], row["format"]): row for row in found["text"]["kv_loss"]}
    rows = []
    for score in found["text"]["scores"]:
        bits, _, kv = score["name"].removeprefix("W").partition(" ")
        own = next((row for (kind, name), row in alone.items() if name == kv and bits in kind), None)
        cache = {key: own[key] for key in ("loss", "kl", "kl_error")} if own is not None else None
        rows.append({
            "model": model.name, "weights": 4 if bits == "4" else 16, "kv": kv, "text": args.text,
            "tokens": score["tokens"], "perplexity": score["perplexity"], "agreement": score["agreement"],
            "kl": score["kl"], "kl_error": score["kl_error"], "cache_alone": cache,
        })  # fmt: skip
    return rows


def table(rows: list[Document]) -> str:
    lines = ["| model | weights | cache | perplexity | KL from 16/16 | KL of the cache alone | same top token, % |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for row in rows:
        kl = f"{row['kl']:.1e} ± {row['kl_error']:.0e}" if row["kl"] else "0"
        alone = f"{row['cache_alone']['kl']:.1e} ± {row['cache_alone']['kl_error']:.0e}" if row["cache_alone"] else ""
        cells = (row["model"], f"{row['weights']} bits", f"`{row['kv']}`", f"{row['perplexity']:.2f}", kl, alone,
                 f"{100 * row['agreement']:.1f}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    cli = options(__doc__, "ptb.*.txt, wikitext2.*.txt")
    cli.add_argument("--kv", default="fp32,kv8,kv4")
    cli.add_argument("--text", default="wikitext2")
    cli.add_argument("--windows", type=int, default=2)
    cli.add_argument("--window", type=int, default=1024)
    cli.add_argument("--budget", default="10m", help="of quantizing")
    cli.add_argument("--dtype", default="auto", help="of quantizing: fp32 is five times as fast without bf16 units")
    args = cli.parse_args()

    rows = kept(args.out)
    for model in args.models:
        four, seconds = quantized(model, args)
        found = [row | {"quantize_seconds": seconds} | here() for row in measure(model, four, args)]
        rows = [row for row in rows if row["model"] != model.name] + found
        keep(args.out, {"benchmark": "corners", **describe(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
