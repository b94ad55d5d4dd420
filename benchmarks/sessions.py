"""What a saved session takes on disk, and how long restoring one takes against computing it again.

One long prompt on the bundled model; for each format a session file of it. Restoring (read, verify, put into the cache)
and prefilling the same tokens alternate in one process, and the ratio of each pair counts; the file was written before,
so it may lie in the system's file cache, as after a restart of the server it does. Each is timed up to the first token
of the same question. The last line is one JSON document.

    python benchmarks/sessions.py --out benchmarks/results/sessions-zen3.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe, tell

from octavo import LLM, SamplingParams
from octavo.calibrate import calibrate
from octavo.models.model import BUNDLED, Model

ONE = SamplingParams(max_tokens=1)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(llm: LLM, prompt: list[int], path: Path, rounds: int) -> dict[str, Any]:
    """Of one format. Both ways end with the first token of `prompt`."""
    pool = llm.engine.pool
    kept = llm.save(path, prompt)
    restore, prefill = [], []

    def back() -> None:
        llm.restore(path)
        assert llm.generate(prompt, ONE)[0].cached_tokens == kept

    def again() -> None:
        assert llm.generate(prompt, ONE)[0].cached_tokens == 0

    for _ in range(rounds):
        for times, work in ((restore, back), (prefill, again)):
            pool.clear()
            times.append(seconds(work))
    ratios = [slow / fast for slow, fast in zip(prefill, restore, strict=True)]
    return {
        "kv": str(llm.format),
        "tokens": kept,
        "file_bytes": path.stat().st_size,
        "restore_ms": round(1e3 * statistics.median(restore), 2),
        "prefill_ms": round(1e3 * statistics.median(prefill), 2),
        "prefill_over_restore": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 1984])
    cli.add_argument("--rounds", type=int, default=15)
    cli.add_argument("--kv", nargs="+", default=["bf16", "int8", "int8-token", "int4-token"])
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()

    model = Model.load()
    ids = model.tokenizer((BUNDLED / "evaluation.txt").read_text(encoding="utf-8"))["input_ids"]
    windows = [ids[i * 512 : (i + 1) * 512] for i in range(8)]
    calibration = calibrate(model, windows, dataset="the bundled evaluation text")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for kv in args.kv:
            llm = LLM(model, kv, calibration=calibration, max_batch_size=2)
            for tokens in args.tokens:
                row = measure(llm, ids[: tokens + 1], Path(directory) / "session", args.rounds)
                rows.append(row)
                print(
                    f"{kv:10s} {row['tokens']:5d} tokens  {row['file_bytes']:9,d} bytes  restored in "
                    f"{row['restore_ms']:.1f} ms, prefilled in {row['prefill_ms']:.1f}: {row['prefill_over_restore']}×"
                )
    sixteen = {row["tokens"]: row["file_bytes"] for row in rows if row["kv"] == "bf16"}
    for row in rows:
        row["bytes_of_bf16"] = (
            round(row["file_bytes"] / sixteen[row["tokens"]], 3) if row["tokens"] in sixteen else None
        )
    document = {"benchmark": "sessions", **describe(), "rounds": args.rounds, "rows": rows}
    tell(document, args.out)


if __name__ == "__main__":
    main()
