"""What each cache format costs on real models, beside peers' formats: the README's table.

Models in float32, calibrated on PTB, measured by `octavo accuracy`'s own code on WikiText-2 and C4: mean KL divergence
from the unquantized cache, nats a token. Peers' formats are simulated (peer_formats.py). Rows are kept in --out after
every few formats, so the same command goes on where it was interrupted, and another --window adds its rows; what was
measured in another way before is measured anew.

    python benchmarks/formats.py MODEL … --data ../shared/data/text --out benchmarks/results/formats-models.json
    python benchmarks/formats.py MODEL … --window 3072 --formats 'kv8;k8v4;kv4;fp8 e4m3, scale 1' …
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import peer_formats
from machine import describe, here
from over_models import calibrated, keep, kept, options

from octavo import KVFormat
from octavo.cli.progress import telling
from octavo.corpus import load_texts
from octavo.measure.accuracy.compare import compare
from octavo.measure.candidate import Candidate
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.text_windows import consecutive_windows

TEXTS = ("wikitext2", "c4")
BASELINE = Candidate("fp32", KVFormat.parse("fp32"))
CALIBRATED = ("kv8", "k8v4", "kv4", "int8-token", "int8", "fp8")
RECIPE = "int8, tensor × 1.0"  # the original recipe, LMDeploy's
UNCALIBRATED = ("kv8, not calibrated", "int8-token, not calibrated", "fp8, not calibrated")
NAMES = (*CALIBRATED, RECIPE, *UNCALIBRATED, *peer_formats.BITS)
KEPT = ("kl", "kl_error", "kl_p99", "agreement", "loss_change", "loss_change_error", "perplexity", "tokens")
AT_ONCE = 4  # formats that share one reading of the baseline

Row = dict[str, Any]


def candidates(model: Model, calibration: Calibration, wanted: Sequence[str]) -> list[Candidate]:
    others = [name for name in wanted if name not in NAMES]
    return [
        *(Candidate(name, KVFormat.parse(name), calibration) for name in (*CALIBRATED, *others) if name in wanted),
        *([Candidate(RECIPE, KVFormat.parse("int8"), calibration.choosing("tensor", 1.0))] if RECIPE in wanted else ()),
        *(Candidate(name, KVFormat.parse(name.split(",")[0])) for name in UNCALIBRATED if name in wanted),
        *(candidate for candidate in peer_formats.candidates(model) if candidate.name in wanted),
    ]


def bits(candidate: Candidate, model: Model) -> float:
    """A value's share of what the cache keeps, scales included; without the rows that edges keep beside it."""
    if candidate.name in peer_formats.BITS:
        return peer_formats.BITS[candidate.name]
    shapes = [shape for shape in model.bound.shapes if shape.shares is None]
    values = sum(shape.kv_heads * (shape.k_dim + shape.v_dim) for shape in shapes)
    return 8 * sum(shape.token_bytes(candidate.format) for shape in shapes) / values


def measure(model: Model, calibration: Calibration, rows: list[Row], args: argparse.Namespace) -> None:
    """Add the rows of `model` that are missing to `rows`, and keep them after every few."""
    chosen = candidates(model, calibration, NAMES if args.formats is None else args.formats.split(";"))
    header = calibration.header
    for text in args.texts:
        how = {
            "model": model.path.name, "text": text, "window": args.window, "windows": args.windows,
            "calibration": f"{header.samples} × {header.seqlen} tokens of {header.dataset}",
        }  # fmt: skip
        known = {row["name"] for row in rows if how.items() <= row.items()}
        missing = [c for c in chosen if c.name not in known]
        windows = consecutive_windows(load_texts(text, args.data, "test"), model.tokenizer, args.window, args.windows)
        for group in (missing[i : i + AT_ONCE] for i in range(0, len(missing), AT_ONCE)):
            title = f"{model.path.name} on {text}: {', '.join(c.name for c in group)}"
            with telling(title) as tell:
                scores = compare(model, [BASELINE, *group], windows, partial(tell, title))
            for candidate, score in zip((BASELINE, *group), scores, strict=True):
                found = {key: value for key, value in asdict(score).items() if key in KEPT}
                row = how | {"name": candidate.name, "bits": bits(candidate, model)} | found | here()
                same = ("model", "text", "window", "name")
                rows[:] = [old for old in rows if any(old[key] != row[key] for key in same)]
                rows.append(row)
            keep(args.out, {"benchmark": "formats", **describe(), "rows": rows})


def table(model: str, rows: Sequence[Row]) -> str:
    """Markdown: mean KL by text and length; in the last column the largest change of perplexity."""
    own = [row for row in rows if row["model"] == model]
    columns = sorted({(row["window"], row["text"]) for row in own}, key=lambda key: (key[0], TEXTS.index(key[1])))
    lines = [
        f"| {model} | bits | " + " | ".join(f"{text}, {window:,}" for window, text in columns) + " | perplexity |",
        "|---|" + "---:|" * (len(columns) + 2),
    ]
    for name in dict.fromkeys((*NAMES, *(row["name"] for row in own if row["name"] != BASELINE.name))):
        found = {(row["window"], row["text"]): row for row in own if row["name"] == name}
        if not found:
            continue
        cells = [f"{found[key]['kl']:.1e}" if key in found else "" for key in columns]
        change = max((math.expm1(row["loss_change"]) for row in found.values()), key=abs)
        lines.append(f"| {name} | {next(iter(found.values()))['bits']:.2f} | {' | '.join(cells)} | {change:+.2%} |")
    return "\n".join(lines)


def main() -> None:
    cli = options(__doc__, "ptb.*.txt, wikitext2.*.txt, c4_sample.jsonl")
    cli.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    cli.add_argument("--window", type=int, default=1024)
    cli.add_argument("--windows", type=int, default=4, help="of each text")
    cli.add_argument("--formats", help="only these, and other formats of --kv, with ; between")
    args = cli.parse_args()

    rows: list[Row] = kept(args.out)
    for path in args.models:
        model = Model.load(path, dtype="float32")
        calibration = calibrated(model, args)
        measure(model, calibration, rows, args)
        del model, calibration
    for name in dict.fromkeys(row["model"] for row in rows):
        print(table(name, rows) + "\n")


if __name__ == "__main__":
    main()
