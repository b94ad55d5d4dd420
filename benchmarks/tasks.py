"""The page's table: benchmark tasks in 16 bits and in int8, on the bundled model or any other.

Calibrates on text that the model writes, then runs `octavo accuracy --tasks all` and adds the commit to its document.

    python benchmarks/tasks.py --data ../shared/data/eval --limit 20 --out benchmarks/results/tasks-pamphlet.json
    python benchmarks/tasks.py --model DIR --kv bf16,int8,kv8,k8v4,kv4 --data … --budget 4h --results KEPT --out …
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from machine import describe

from octavo.cli import main as octavo


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


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", default="pamphlet")
    cli.add_argument("--kv", default="fp16,int8")
    cli.add_argument("--data", type=Path, required=True, help="folder of the tasks' raw files")
    cli.add_argument("--limit", type=int, help="documents of each task")
    cli.add_argument("--budget", default="none", help="time for all, of which each task gets its share, if no --limit")
    cli.add_argument("--tasks", default="all")
    cli.add_argument("--max-batch-size", type=int, default=16)
    cli.add_argument("--calibration", type=Path, help="a calibration that is there already")
    cli.add_argument("--results", type=Path, help="where results are kept, so that a run can go on")
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        calibration = args.calibration or Path(directory)
        if args.calibration is None:
            run("calibrate", args.model, "--calib-samples", 16, "--calib-seqlen", 512, "--work-dir", calibration)
        limit = ["--limit", args.limit] if args.limit else ["--budget", args.budget]
        kept = args.results or calibration / "results"
        options = ["--kv", args.kv, "--calibration", calibration, "--max-batch-size", args.max_batch_size]
        options += ["--data-dir", args.data, "--results", kept, *limit]
        document = json.loads(run("accuracy", args.model, "--tasks", args.tasks, *options, "--json"))
    del document["tasks"]["results"]  # a path of this machine, as are the reasons for what was skipped
    document["tasks"]["skipped"] = list(document["tasks"]["skipped"])
    document = {"benchmark": "tasks", "commit": describe()["commit"], **document}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    main()
