"""How little calibration is enough: KL divergence of each format by what it was calibrated on.

One calibration for each of TRIALS (text, windows, tokens in each) and model, measured by the code of `octavo accuracy`
on the same windows of WikiText-2, in float32. Rows are kept in --out after each trial; the same command goes on.

    python benchmarks/calibration.py MODEL … --data ../shared/data/text --out benchmarks/results/calibration.json
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe, here
from over_models import keep, kept, options

from octavo import LLM, KVFormat
from octavo.calibrate import calibrate
from octavo.cli.progress import telling
from octavo.corpus import load_texts
from octavo.measure.accuracy.compare import compare
from octavo.measure.candidate import Candidate
from octavo.models.model import Model
from octavo.text_windows import consecutive_windows, self_windows, token_windows

TRIALS = (
    ("none", 0, 0),
    ("ptb", 8, 512),
    ("prose", 8, 512),
    ("ptb", 2, 512),
    ("c4", 8, 512),
    ("ptb", 16, 512),
    ("prose", 8, 256),
    ("self", 8, 512),
    ("ptb", 4, 512),
    ("ptb", 32, 512),
    ("ptb", 16, 256),
    ("ptb", 4, 1024),
    ("prose", 16, 512),
)  # in the order of their worth, since time may end
TEXTS = {"ptb": "PTB", "c4": "C4", "prose": "English prose (bundled)", "self": "its own text"}
BASELINE = Candidate("fp32", KVFormat.parse("fp32"))


def windows_of(model: Model, text: str, count: int, length: int, data: Path) -> list[list[int]]:
    if text == "self":
        return self_windows(LLM(model, session_len=length + 1, max_batch_size=count), count, length)
    texts = load_texts(None if text == "prose" else text, data)
    return token_windows(texts, model.tokenizer, count, length)


def trial(
    model: Model, text: str, count: int, length: int, formats: list[str], read: list[list[int]], data: Path, tell: Any
) -> list[dict[str, Any]]:
    """One row for each format that can be served with this calibration."""
    start = time.perf_counter()
    own = None
    if count:
        windows = windows_of(model, text, count, length, data)
        own = calibrate(model, windows, dataset=text, progress=partial(tell, "calibrating"))
    seconds = time.perf_counter() - start
    served = [name for name in formats if own is not None or not KVFormat.parse(name).needs_calibration]
    candidates = [Candidate(name, KVFormat.parse(name), own) for name in served]
    scores = compare(model, [BASELINE, *candidates], read, lambda *step: tell("comparing", *step))[1:]
    same = {"model": model.path.name, "text": text, "windows": count, "length": length}
    return [
        same | here() | {"name": score.name, "kl": score.kl, "kl_error": score.kl_error, "tokens": score.tokens,
                "seconds": round(seconds, 1)}
        for score in scores
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a model after the other, a line for each calibration."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        names = [name for name in ("kv8", "k8v4", "kv4", "int8") if any(row["name"] == name for row in own)]
        lines += [f"| {model}, calibrated on | {' | '.join(f'`{name}`' for name in names)} |"]
        lines += ["|---|" + "---:|" * len(names)]
        for text, count, length in TRIALS:
            found = {r["name"]: r for r in own if (r["text"], r["windows"], r["length"]) == (text, count, length)}
            if found:
                cells = (f"{r['kl']:.1e} ± {r['kl_error']:.0e}" if (r := found.get(n)) else "–" for n in names)
                title = "nothing" if text == "none" else f"{TEXTS[text]}, {count} × {length}"
                lines.append(f"| {title} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).strip()


def main() -> None:
    cli = options(__doc__, "ptb.*.txt, wikitext2.*.txt, c4_sample.jsonl", calibrates=False)
    cli.add_argument("--formats", default="kv8,k8v4,kv4,int8")
    cli.add_argument("--windows", type=int, default=4, help="windows that are measured on")
    cli.add_argument("--window", type=int, default=512)
    cli.add_argument("--trials", type=int, default=len(TRIALS), help="only the first so many")
    args = cli.parse_args()

    rows = kept(args.out)
    for path in args.models:
        model = Model.load(path, dtype="fp32")
        texts = load_texts("wikitext2", args.data, "test")
        read = consecutive_windows(texts, model.tokenizer, args.window, args.windows)
        for text, count, length in TRIALS[: args.trials]:
            same = {"model": model.path.name, "text": text, "windows": count, "length": length}
            if any(same.items() <= row.items() for row in rows):
                continue
            with telling(f"{model.path.name}: {text} {count} × {length}") as tell:
                rows += trial(model, text, count, length, args.formats.split(","), read, args.data, tell)
            document = {"benchmark": "calibration", **describe(), "measured": f"{args.windows} × {args.window}"}
            keep(args.out, document | {"rows": rows})


if __name__ == "__main__":
    main()
