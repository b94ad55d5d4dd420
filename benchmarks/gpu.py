"""Everything that wants a GPU, in one run: tests, kernels, the engine, memory, and transformers' continuous batching.

Each part is a process of its own (gpu_parts/): one that fails is recorded with its traceback, and the others go on. A
part that is left no time is recorded as not run. Writes benchmarks/results/gpu-<device>.json, keeping the parts that an
earlier run of the same commit has left there, and prints the table.

    PYTHONPATH=. python benchmarks/gpu.py --minutes 9.5 --parts kernels engine
    PYTHONPATH=. python benchmarks/gpu.py --minutes 9.5 --parts tests memory transformers_batching
    PYTHONPATH=. python benchmarks/gpu.py --dry-run    # on a CPU, at toy sizes: the script itself, no results
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gpu_parts.rows import parse
from gpu_parts.table import table
from machine import commit

from octavo.measure.machine import describe

HERE = Path(__file__).parent
PARTS = {  # name: most seconds, in the order in which a short lease is best spent
    "kernels": 240,
    "engine": 240,
    "tests": 240,
    "memory": 330,
    "transformers_batching": 120,
}


def run(part: str, seconds: float, dry: bool) -> dict[str, Any]:
    """One part's rows, and how its process ended: 0, its exit code, or None where it ran out of time."""
    command = [sys.executable, str(HERE / "gpu_parts" / f"{part}.py"), *(["--dry-run"] if dry else [])]
    environment = dict(os.environ)
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OCTAVO_ATTENTION": "triton" if part == "kernels" else "reference"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    late = threading.Event()

    def end() -> None:
        """The part and all it has started: a grandchild would keep the GPU, and the pipe open."""
        late.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.start()
    rows, tail = [], []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            row = parse(line)
            if row is None:
                tail = [*tail[-60:], line.rstrip()]
            else:
                rows.append(row)
                print(f"  {line.rstrip()[:300]}", flush=True)
        code = process.wait()
        in_time = not late.is_set()
    finally:  # Ctrl-C does not reach another session
        timer.cancel()
        end()
    found: dict[str, Any] = {
        "seconds": round(time.monotonic() - start, 1),
        "exit": code if in_time else None,
        "rows": rows,
    }
    if code:
        found["output"] = tail
    return found


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    cli.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    cli.add_argument("--dry-run", action="store_true")
    cli.add_argument("--out", type=Path, help="by default benchmarks/results/gpu-<device>.json; none for a dry run")
    args = cli.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("there is no GPU here: --dry-run tries the script itself")

    device = torch.device("cpu" if args.dry_run else "cuda")
    document: dict[str, Any] = {
        "benchmark": "gpu", "dry_run": args.dry_run, "commit": commit(), **describe(device), "parts": {},
    }  # fmt: skip
    name = re.sub(r"\W+", "-", str(document["device"]).lower()).strip("-")
    out = args.out or (None if args.dry_run else HERE / "results" / f"gpu-{name}.json")
    if out is not None and out.is_file() and document["commit"] is not None:
        earlier = json.loads(out.read_text())
        if earlier["commit"] == document["commit"]:
            document["parts"] = earlier["parts"]
    deadline = time.monotonic() + 60 * args.minutes
    for part in args.parts:
        left = deadline - time.monotonic()
        if left < 15:
            document["parts"][part] = {"exit": None, "rows": [], "output": ["no time was left"]}
            continue
        print(f"{part}:", flush=True)
        document["parts"][part] = run(part, min(left, PARTS[part]), args.dry_run)
        if out is not None:
            out.write_text(json.dumps(document, indent=1) + "\n")  # after every part: the lease may end
    print(table(document))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
