"""The page's table: benchmark tasks in 16 bits and in quantized caches, on the bundled model or any other.

Runs `octavo accuracy --tasks` on a calibration that is there, or on text that the model writes, and adds the rows to
those of the same model that --out holds already. With --shots examples stand before each question: short questions
alone would never read a code of a format with edges. What was asked is kept in --results; the same command goes on.

    python benchmarks/tasks.py --data ../shared/data/eval --limit 20 --out benchmarks/results/tasks-pamphlet.json
    python benchmarks/tasks.py --model DIR --kv bf16,int8,kv8,k8v4,kv4 --tasks winogrande,openbookqa --shots 20 --data …
    python benchmarks/tasks.py --table benchmarks/results/tasks-smollm2.json benchmarks/results/tasks-qwen2.5-0.5b.json
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from machine import describe, here

from octavo.cli import main as octavo
from octavo.measure.tasks import BENCHMARKS

Document = dict[str, Any]


def run(*argv: object) -> str:
    """What an `octavo` command prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            octavo([str(argument) for argument in argv])
        except SystemExit as done:
            if done.code:
                raise
    return out.getvalue()


def measure(args: argparse.Namespace) -> Document:
    with tempfile.TemporaryDirectory() as directory:
        calibration = args.calibration or Path(directory)
        if args.calibration is None:
            run("calibrate", args.model, "--calib-samples", 16, "--calib-seqlen", 512, "--work-dir", calibration)
        options = ["--limit", args.limit] if args.limit else ["--budget", args.budget]
        options += ["--shots", args.shots] if args.shots is not None else []
        options += ["--session-len", args.session_len] if args.session_len is not None else []
        options += ["--kv", args.kv, "--calibration", calibration, "--max-batch-size", args.max_batch_size]
        options += ["--data-dir", args.data, "--results", args.results or calibration / "results"]
        options += ["--model-format", args.model_format, "--tasks", args.tasks, "--json"]
        found: Document = json.loads(run("accuracy", args.model, *options))
    found["model"] = Path(args.model).name  # no path of this machine, as results and reasons are below
    del found["tasks"]["results"]
    found["tasks"]["skipped"] = list(found["tasks"]["skipped"])
    for name in ("limit", "shots"):
        for row in found["tasks"]["rows"]:
            row[name] = found["tasks"][name]
        del found["tasks"][name]
    for row in found["tasks"]["rows"]:
        row |= here()
    return {"benchmark": "tasks", "commit": describe()["commit"], **found}


def merged(old: Document, new: Document) -> Document:
    """The new document, with the rows of the old one that it does not measure anew."""
    if (old["model"], old["baseline"]) != (new["model"], new["baseline"]):
        raise SystemExit(f"--out holds results of {old['model']} over {old['baseline']}: name another file")
    known = {_of(row) for row in new["tasks"]["rows"]}
    new["tasks"]["rows"] += [row for row in old["tasks"]["rows"] if _of(row) not in known]
    return new


def _of(row: Document) -> tuple[Any, ...]:
    return row["name"], row.get("shots"), tuple(row["scores"])


def table(document: Document) -> str:
    """Markdown: the baseline's score, whether it solves the task, and each format's difference from it."""
    lines = []
    for formats in dict.fromkeys(tuple(row["scores"]) for row in document["tasks"]["rows"]):
        base, *others = formats
        cells = [document["model"], "shots", "n", f"`{base}`", "solved", *(f"`{name}` −" for name in others)]
        lines += [f"| {' | '.join(cells)} |", "|---|" + "---:|" * 3 + "---|" + "---:|" * len(others)]
        for row in sorted(document["tasks"]["rows"], key=lambda row: list(BENCHMARKS).index(row["name"].split()[0])):
            if tuple(row["scores"]) == formats:
                score = f"{row['scores'][base]:.1f} ± {row['errors'][base]:.1f}"
                changes = [f"{row['differences'][n]:+.1f} ± {row['difference_errors'][n]:.1f}" for n in others]
                shots = row.get("shots")
                cells = [row["name"], "–" if shots is None else str(shots), str(row["items"]), score, _solved(row)]
                lines.append(f"| {' | '.join(cells + changes)} |")
        lines.append("")
    return "\n".join(lines)


def _solved(row: Document) -> str:
    if row["solved"] is None:
        return "–"
    guess = f", {row['guess']:g} by guessing" if row["guess"] else ""
    return ("yes" if row["solved"] else "no") + guess


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", default="pamphlet")
    cli.add_argument("--model-format", default="hf")
    cli.add_argument("--kv", default="fp16,int8")
    cli.add_argument("--data", type=Path, help="folder of the tasks' raw files")
    cli.add_argument("--limit", type=int, help="documents of each task")
    cli.add_argument("--budget", default="none", help="time for all, of which each task gets its share, if no --limit")
    cli.add_argument("--tasks", default="all")
    cli.add_argument("--shots", type=int, help="examples before each question")
    cli.add_argument("--session-len", type=int)
    cli.add_argument("--max-batch-size", type=int, default=16)
    cli.add_argument("--calibration", type=Path, help="a calibration that is there already")
    cli.add_argument("--results", type=Path, help="where results are kept, so that a run can go on")
    cli.add_argument("--out", type=Path)
    cli.add_argument("--table", type=Path, nargs="+", help="write these results as Markdown, and measure nothing")
    args = cli.parse_args()

    if args.table:
        print("\n".join(table(json.loads(path.read_text())) for path in args.table))
        return
    found = measure(args)
    if args.out:
        if args.out.is_file():
            found = merged(json.loads(args.out.read_text()), found)
        args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
