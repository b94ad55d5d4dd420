"""What cache formats cost in long contexts: KL divergence by position, and values looked up by their keys.

By position: one text of each length is read in every format in lockstep (`octavo accuracy`'s code), and KL is told for
each doubling of the position. Looking up: lists of keys and values (octavo/measure/accuracy/retrieval.py). Models in
float32. Rows are kept in --out as they come, and the same command goes on.

    python benchmarks/long_context.py MODEL … --data ../shared/data/text --work-dir DIR --out benchmarks/results/long-context.json
    python benchmarks/long_context.py --plot docs/long-context.svg --out benchmarks/results/long-context.json
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from formats import BASELINE
from machine import describe, here
from over_models import calibrated, keep, options

from octavo.cli.progress import telling
from octavo.corpus import load_texts
from octavo.measure.accuracy.compare import measured
from octavo.measure.accuracy.retrieval import make_context, retrieve
from octavo.measure.candidate import Candidate
from octavo.measure.report.plots import colour
from octavo.measure.report.svg import drawn, standalone
from octavo.models.model import Model
from octavo.quant.format import KVFormat
from octavo.text_windows import consecutive_windows

EDGES = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # positions between which KL is averaged

Document = dict[str, Any]


def by_position(model: Model, candidates: list[Candidate], length: int, args: argparse.Namespace) -> list[Document]:
    """One row for each format and doubling of the position."""
    texts = load_texts(args.text, args.data, "test")
    windows = consecutive_windows(texts, model.tokenizer, length, args.windows)
    title = f"{model.path.name}: {length:,} tokens"
    with telling(title) as tell:
        found = measured(model, [BASELINE, *candidates], windows, partial(tell, title))[1:]
    same = {"model": model.path.name, "text": args.text, "length": length, "windows": len(windows)}
    rows = []
    for one in found:
        for start, stop in pairwise([edge for edge in EDGES if edge < length] + [length]):
            kl = one.kl[:, start : stop - 1].mean().item()
            rows.append(same | {"name": one.name, "start": start, "stop": stop, "kl": kl})
    return rows


def looked_up(model: Model, candidates: list[Candidate], length: int, args: argparse.Namespace) -> list[Document]:
    asked = make_context(model.tokenizer, length, questions=args.questions)
    with telling(f"{model.path.name}: looking up in {length:,}") as tell:
        rows = retrieve(model, [BASELINE, *candidates], asked, length, tell)
    return [{"model": model.path.name, **asdict(row)} for row in rows]


def longest(rows: list[Document], model: str) -> list[Document]:
    """Of the longest text that a model has read."""
    own = [row for row in rows if row["model"] == model]
    return [row for row in own if row["length"] == max(row["length"] for row in own)]


def table(found: Document) -> str:
    """Markdown: KL by position, then what was found of what was asked."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in found["positions"]):
        own = longest(found["positions"], model)
        names = list(dict.fromkeys(row["name"] for row in own))
        lines += [f"| {model}, tokens | " + " | ".join(f"`{name}`" for name in names) + " |"]
        lines += ["|---|" + "---:|" * len(names)]
        for start, stop in dict.fromkeys((row["start"], row["stop"]) for row in own):
            cells = [next(r["kl"] for r in own if (r["name"], r["start"]) == (name, start)) for name in names]
            lines.append(f"| {start:,}–{stop - 1:,} | " + " | ".join(f"{kl:.1e}" for kl in cells) + " |")
        lines.append("")
    for model in dict.fromkeys(row["model"] for row in found["retrieval"]):
        own = [row for row in found["retrieval"] if row["model"] == model]
        lengths = sorted({row["length"] for row in own})
        lines += [f"| {model}, looked up in | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |"]
        lines += ["|---|" + "---:|" * len(lengths)]
        for name in dict.fromkeys(row["name"] for row in own):
            cells = []
            for row in ({r["length"]: r for r in own if r["name"] == name}.get(length) for length in lengths):
                if row is None:
                    cells.append("")
                    continue
                found_of = f"{row['right'] * row['questions']:.0f} of {row['questions']}"
                change = f", {row['change']:+.3f} ± {row['change_error']:.3f}" if name != BASELINE.name else ""
                cells.append(found_of + change)
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(found: Document, path: Path) -> None:
    """A column for each model: KL over the position, and the change of the looked-up values' log-probability."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in found["positions"]))
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    grid = figure.subplots(2, len(models), squeeze=False, sharey="row")
    for (upper, lower), model in zip(grid.T, models, strict=True):
        own = longest(found["positions"], model)
        for name in dict.fromkeys(row["name"] for row in own):
            parts = [row for row in own if row["name"] == name]
            middles = [math.sqrt(max(row["start"], 256) * row["stop"]) for row in parts]
            upper.plot(middles, [row["kl"] for row in parts], "o-", color=_colour(name), markersize=3.5, label=name)
        upper.set(xscale="log", yscale="log", title=model, xlabel="position, tokens")
        asked = [row for row in found["retrieval"] if row["model"] == model]
        for name in dict.fromkeys(row["name"] for row in asked if row["name"] != BASELINE.name):
            rows = sorted((row for row in asked if row["name"] == name), key=lambda row: row["length"])
            lower.errorbar(
                [row["length"] for row in rows], [row["change"] for row in rows],
                [row["change_error"] for row in rows], color=_colour(name), marker="o", markersize=3.5, linewidth=1.2,
            )  # fmt: skip
        lower.set(xscale="log", xlabel="tokens of the list")
        lower.axison = bool(asked)
        for plot, ticks in ((upper, EDGES[1:]), (lower, sorted({row["length"] for row in asked}))):
            ticks = [tick for tick in ticks if tick <= own[0]["length"]]
            plot.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            plot.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    grid[0][0].set_ylabel("KL, nats a token")
    grid[1][0].set_ylabel("log-probability, change in nats")
    grid[0][0].legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.38))  # between 8 bits and 4
    path.write_text(standalone(drawn(figure, "long-context")))


def _colour(name: str) -> str:
    from octavo.measure.report.svg import LIGHT, ROLES

    return LIGHT[ROLES[colour(name)]]


def main() -> None:
    cli = options(__doc__, "ptb.*.txt, wikitext2.*.txt", models="*")
    cli.add_argument("--text", default="wikitext2")
    cli.add_argument("--formats", default="kv8,k8v4,kv4,int8")
    cli.add_argument("--positions", type=int, nargs="*", default=[8192], help="lengths of texts")
    cli.add_argument("--windows", type=int, default=1, help="texts of each length")
    cli.add_argument("--retrieval", type=int, nargs="*", default=[2048, 4096, 8192], help="lengths of lists")
    cli.add_argument("--questions", type=int, default=24)
    cli.add_argument("--plot", type=Path, help="an .svg file")
    args = cli.parse_args()

    found: Document = {"benchmark": "long context", "positions": [], "retrieval": []}
    if args.out.is_file():
        found |= json.loads(args.out.read_text())
    for path in args.models:
        model = Model.load(path, dtype="float32")
        calibration = calibrated(model, args)
        candidates = [Candidate(name, KVFormat.parse(name), calibration) for name in args.formats.split(",")]
        for kind, lengths, measure in (
            ("retrieval", args.retrieval, looked_up),
            ("positions", args.positions, by_position),
        ):
            for length in lengths:
                same = {"model": model.path.name, "length": length}
                if not any(same.items() <= row.items() for row in found[kind]):
                    found[kind] += [row | here() for row in measure(model, candidates, length, args)]
                    keep(args.out, found | describe())
    print(table(found))
    if args.plot is not None:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
