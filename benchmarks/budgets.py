"""Do the budgets hold? `calibrate`, `doctor` and `accuracy` with their defaults on real models, one after the other.

Each runs in a process of its own, as a user runs it; kept are the seconds that it took, what it said before, and what
`accuracy` found: perplexity, KL, top-1 and where greedy answers part. Loading comes on top of a budget.

    python benchmarks/budgets.py MODEL … --data ../shared/data/text --work-dir DIR --out benchmarks/results/budgets.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe
from over_models import keep, kept, options

KV = "bf16,int8,kv8,k8v4,kv4"
UNITS = {"h": 3600, "min": 60, "s": 1}

Document = dict[str, Any]


def commands(model: Path, args: argparse.Namespace) -> dict[str, list[object]]:
    calibration = args.work_dir / model.name
    return {
        "calibrate": ["calibrate", model, "--work-dir", calibration],
        "doctor": ["doctor", model, "--json"],
        "accuracy": ["accuracy", model, "--kv", KV, "--calibration", calibration, "--text", "wikitext2",
                     "--data-dir", args.data, "--json"],
    }  # fmt: skip


def told(said: str) -> float:
    """Seconds that a verb said its parts would take."""
    seconds = 0.0
    for estimate in re.findall(r"about ((?:\d+ (?:h|min|s) ?)+)", said):
        seconds += sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+) (h|min|s)", estimate))
    return seconds


def row(model: str, verb: str, seconds: float, out: str, err: str) -> Document:
    said = [line for line in re.split(r"[\r\n]", err) if "about" in line]
    found = {"model": model, "verb": verb, "seconds": round(seconds, 1), "told": told("\n".join(said)), "said": said}
    if verb == "accuracy":
        text = json.loads(out)["text"]
        for score in text["scores"]:
            del score["kl_by_bin"]
        found |= {"text": text}
    return found


def table(rows: list[Document]) -> str:
    """Markdown: perplexity, KL, top-1, and the share of greedy answers that part."""
    lines = []
    for found in (row for row in rows if row["verb"] == "accuracy"):
        text, greedy = found["text"], {row["name"]: row for row in found["text"]["greedy"]["rows"]}
        lines += [f"| {found['model']}, {text['scores'][0]['tokens']:,} tokens | perplexity | change, % | KL | "
                  "same top token, % | greedy answers that differ | first differing token, median |",
                  "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
        for score in text["scores"]:
            cells = [f"`{score['name']}`", f"{score['perplexity']:.3f}", "", "0", "", "", ""]
            if (own := greedy.get(score["name"])) is not None:
                count, length = text["greedy"]["prompts"], text["greedy"]["answer_tokens"]
                change = f"{100 * score['loss_change']:+.2f} ± {100 * score['loss_change_error']:.2f}"
                kl = f"{score['kl']:.1e} ± {score['kl_error']:.0e}"
                top = f"{100 * score['agreement']:.2f} ± {100 * score['agreement_error']:.2f}"
                median = f"≥ {length}" if own["median"] >= length else f"{own['median']:g}"
                cells[2:] = [change, kl, top, f"{count - own['equal']} of {count}", median]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).strip()


def times(rows: list[Document]) -> str:
    lines = ["| verb | model | told | took, loading included |", "|---|---|---:|---:|"]
    for found in rows:
        lines.append(f"| `{found['verb']}` | {found['model']} | {found['told']:.0f} s | {found['seconds']:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    cli = options(__doc__, "wikitext2.*.txt", calibrates=False)
    cli.add_argument("--verbs", nargs="+", default=["calibrate", "doctor", "accuracy"])
    args = cli.parse_args()

    rows = kept(args.out)
    for model in args.models:
        for verb in args.verbs:
            command = [sys.executable, "-m", "octavo", *map(str, commands(model, args)[verb])]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = row(model.name, verb, time.perf_counter() - start, done.stdout, done.stderr)
            rows = [old for old in rows if (old["model"], old["verb"]) != (model.name, verb)] + [found]
            keep(args.out, {"benchmark": "budgets", **describe(), "rows": rows})
    print(times(rows), table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
