"""What each cache format costs in accuracy, in and out of the calibration's domain: the README's tables.

Two models: `pamphlet`, and the same with Qwen2-like key biases (large biases on a few key channels of the first and
last layer), which is where int8 caches of other engines break. Each is calibrated on PTB and on text it wrote itself,
and measured on PTB test, C4 and stories in the chat template, in float32, against the fp32 cache. `fp8` is simulated:
K and V rounded to e4m3 with scale 1. The last line is one JSON document.

    python benchmarks/formats.py --data ../shared/data/text --stories ../shared/model/val_stories.bin.xz \
        --out benchmarks/results/formats-cpu.json --markdown docs/FORMATS.md
"""

from __future__ import annotations

import argparse
import json
import lzma
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from biased import save_biased
from machine import describe
from torch import Tensor

from octavo import LLM, KVFormat
from octavo.calibrate import calibrate
from octavo.cli.progress import progress
from octavo.corpus import load_texts
from octavo.measure.accuracy.compare import Score, compare
from octavo.measure.candidate import Candidate
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.text_windows import consecutive_windows, self_windows, token_windows

HEADROOMS = (1.0, 1.25, 1.4, 1.5, 2.0)


def fp8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def candidates(calibration: Calibration) -> list[Candidate]:
    def int8(name: str, granularity: Any, headroom: float) -> Candidate:
        return Candidate(name, KVFormat.parse("int8"), calibration, granularity, headroom)

    return [
        Candidate("fp8 e4m3, scale 1 (simulated)", KVFormat.parse("fp32"), simulate=fp8),
        int8("int8 tensor × 1.0 (the original recipe)", "tensor", 1.0),
        *(int8(f"int8 head × {headroom}", "head", headroom) for headroom in (1.0, 1.5)),
        *(int8(f"int8 channel × {headroom}", "channel", headroom) for headroom in HEADROOMS),
        Candidate("int8-token", KVFormat.parse("int8-token"), calibration),
        Candidate("int8-token, not calibrated", KVFormat.parse("int8-token")),
        Candidate("int4-token (rotated)", KVFormat.parse("int4-token"), calibration),
        Candidate("int4-token-unrotated", KVFormat.parse("int4-token-unrotated"), calibration),
        Candidate("int4-token (rotated), not calibrated", KVFormat.parse("int4-token")),
        Candidate("int4-token-unrotated, not calibrated", KVFormat.parse("int4-token-unrotated")),
        Candidate("k8v4", KVFormat.parse("k8v4"), calibration),
        Candidate("k8v4, not calibrated", KVFormat.parse("k8v4")),
    ]


def measure(model: Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    stories = np.frombuffer(lzma.decompress(args.stories.read_bytes()), dtype=np.uint16).tolist()
    texts = {
        name: consecutive_windows(load_texts(name, args.data, "test"), model.tokenizer, args.window, args.windows)
        for name in ("ptb", "c4")
    }
    starts = range(0, len(stories) - args.window, args.window)
    texts["stories"] = [stories[start : start + args.window] for start in starts][: args.windows]

    samples, seqlen = args.samples, args.seqlen
    drawn = {
        "ptb": token_windows(load_texts("ptb", args.data), model.tokenizer, samples, seqlen),
        "self": self_windows(LLM(model), samples, seqlen),
    }
    rows = []
    for source, windows in drawn.items():
        calibration = calibrate(model, list(windows), dataset=source)
        for text, held_out in texts.items():
            with progress() as bar:
                task = bar.add_task(f"{model.name}: calibrated on {source}, measured on {text}", total=len(held_out))
                scores = compare(
                    model,
                    Candidate("fp32", KVFormat.parse("fp32")),
                    candidates(calibration),
                    held_out,
                    progress=lambda done, bar=bar, task=task: bar.update(task, completed=done),
                )
            base = scores[0].perplexity
            for score in scores:
                row = {"calibrated_on": source, "text": text, **_numbers(score)}
                rows.append({**row, "perplexity_change": score.perplexity / base - 1})
    return rows


def _numbers(score: Score) -> dict[str, Any]:
    return {key: value for key, value in asdict(score).items() if not key.startswith("kl_by_")}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean KL by calibration and text, the worst of them, and the largest change of perplexity."""
    columns = list(dict.fromkeys((row["calibrated_on"], row["text"]) for row in rows))
    lines = [
        "| format | " + " | ".join(f"{text}<br>({source})" for source, text in columns) + " | worst KL | perplexity |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        if name == "fp32":
            cells = [f"ppl {row['perplexity']:.2f}" for row in own] + ["0", "0"]
        else:
            change = max((row["perplexity_change"] for row in own), key=abs)
            cells = [f"{row['kl']:.1e}" for row in own] + [f"**{max(row['kl'] for row in own):.1e}**", f"{change:+.2%}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--data", type=Path, required=True, help="folder of ptb.*.txt and c4_sample.jsonl")
    cli.add_argument("--stories", type=Path, required=True, help="held-out stories: uint16 token ids, xz")
    cli.add_argument("--samples", type=int, default=128)
    cli.add_argument("--seqlen", type=int, default=2048)
    cli.add_argument("--window", type=int, default=1024)
    cli.add_argument("--windows", type=int, default=8)
    cli.add_argument("--out", type=Path)
    cli.add_argument("--markdown", type=Path)
    args = cli.parse_args()

    plain = Model.load(dtype="float32")
    document: dict[str, Any] = {"benchmark": "formats", **describe()}
    document |= {key: getattr(args, key) for key in ("samples", "seqlen", "window", "windows")}
    document["pamphlet"] = measure(plain, args)
    with tempfile.TemporaryDirectory() as directory:
        model = Model.load(save_biased(plain, Path(directory)), dtype="float32")
        model.name = "key-biased"
        document["key-biased"] = measure(model, args)
    tables = [f"## {name}\n\n{table(document[name])}\n" for name in ("pamphlet", "key-biased")]
    if args.markdown:
        where = (
            f"commit {document['commit']}, {document['processor']}, {document['threads']} threads, {document['date']}"
        )
        head = (
            "# Accuracy of the formats\n\nGenerated by `benchmarks/formats.py`; its first lines say what is measured."
        )
        head += (
            " Columns: text (calibrated on). Numbers: mean KL divergence from the fp32 cache, nats; the last column is"
        )
        head += f" the largest change of perplexity.\n\n{where}; {args.samples} calibration windows of {args.seqlen}"
        head += " tokens,"
        head += f" up to {args.windows} windows of {args.window} a text.\n\n"
        args.markdown.write_text(head + "\n".join(tables))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(tables))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
