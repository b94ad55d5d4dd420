"""What formats that are tuned layer by layer lose beside one format for all layers: KL over bits, as a picture.

Models in float32, calibrated on PTB; what each part of the cache loses is measured on the bundled English prose, the
default of `octavo tune`, formats are chosen for several sizes, and all are measured by `octavo accuracy`'s own code on
WikiText-2 and C4, which neither has seen. Whatever is done is kept in --out, and the same command goes on where it was
interrupted; with more --parts it adds windows, and measures anew the formats that are then chosen.

    python benchmarks/tune.py MODEL … --data ../shared/data/text --out benchmarks/results/tune.json --plot docs/tune.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from formats import AT_ONCE, BASELINE
from machine import describe, here
from over_models import calibrated, keep, options

from octavo import KVFormat
from octavo.cache.size import CacheSize
from octavo.cli.progress import progress, telling
from octavo.corpus import load_texts
from octavo.measure.accuracy.compare import measured, scores
from octavo.measure.candidate import Candidate
from octavo.measure.report.svg import LIGHT, drawn, standalone
from octavo.measure.tune.choice import choose, formats_of, token_budget
from octavo.measure.tune.sensitivity import FEW, UNIFORM, Sensitivity, measure, readings, sides_of
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.text_windows import consecutive_windows, token_windows

TEXTS = ("wikitext2", "c4")
FOR_ALL = (*UNIFORM, "k4v8")
BITS = (4.5, 5.0, 5.5, 6.0, 6.125, 6.5, 7.0, 7.5)
DRAWN = 8  # windows of the prose, of which the first so many as are asked for are read
KEPT = ("kl", "kl_error", "agreement", "tokens")

Document = dict[str, Any]


def sensitivity(model: Model, calibration: Calibration, found: Document, args: argparse.Namespace) -> Sensitivity:
    """What each part loses, over so many windows; each window is kept between runs."""
    name = model.path.name
    kept = found["parts"].setdefault(name, {"text": "prose", "length": args.length, "windows": []})
    assert kept["length"] == args.length, "windows of another length are kept in --out: name another file"
    windows = token_windows(load_texts(None), model.tokenizer, DRAWN, args.length)
    for window in windows[len(kept["windows"]) : args.parts]:
        with progress() as bar:
            task = bar.add_task(f"{name}: parts", total=readings(model.bound))
            own = measure(model.bound, calibration, [window], lambda _: True, partial(bar.advance, task))
        kl = [[part.layer, part.side, part.kl[FEW]] for part in own.sides]
        kept["windows"].append({"uniform": own.uniform, "kl": kl, **here()})
        keep(args.out, found)
    read = kept["windows"][: args.parts]
    few = {(layer, side): fmean(_lost(window, layer, side) for window in read) for layer, side, _ in read[0]["kl"]}
    uniform = {name: fmean(window["uniform"][name] for window in read) for name in UNIFORM}
    return Sensitivity(sides_of(model.bound, few, uniform["kv8"]), uniform, len(read), args.length)


def _lost(window: Document, layer: int, side: str) -> float:
    return next(kl for *part, kl in window["kl"] if part == [layer, side])


def candidates(
    model: Model, calibration: Calibration, parts: Sensitivity, uniform: Sequence[str], sizes: Sequence[float]
) -> list[tuple[Candidate, float | None]]:
    """What is compared, each with the KL that it is expected to have on the windows of the parts."""
    few = {part.side: sum(p.kl[FEW] for p in parts.sides if p.side == part.side) for part in parts.sides}
    several: list[tuple[Candidate, float | None]] = [
        (Candidate(name, KVFormat.parse(name), calibration), sum(few.values()) if name == "kv4" else None)
        for name in uniform
    ]
    for bits in sizes:
        chosen = choose(parts.sides, token_budget(model.bound, bits))
        expected = sum(part.kl[codec] for part, codec in zip(parts.sides, chosen, strict=True))
        formats = formats_of(model.bound, parts.sides, chosen)
        several.append((Candidate(f"tuned, {bits:g} bits", formats, calibration), expected))
    return several


def compared(model: Model, calibration: Calibration, parts: Sensitivity, found: Document, text: str, args: Any) -> None:
    """Add the rows of a text that are missing, in place of those that were measured in another way, and keep them after
    every few."""
    how = {"model": model.path.name, "text": text, "window": args.window, "windows": args.windows}
    on = {"parts": parts.windows, "length": parts.length}  # what formats are chosen from

    def row_of(name: str) -> Document:
        return how | {"name": name} | (on if name.startswith("tuned") else {})

    def known(name: str) -> bool:
        return any(row_of(name).items() <= row.items() for row in found["rows"])

    several = candidates(model, calibration, parts, args.uniform, args.bits)
    missing = [(candidate, expected) for candidate, expected in several if not known(candidate.name)]
    windows = consecutive_windows(load_texts(text, args.data, "test"), model.tokenizer, args.window, args.windows)
    for group in (missing[i : i + AT_ONCE] for i in range(0, len(missing), AT_ONCE)):
        title = f"{model.path.name} on {text}: {group[0][0].name} …"
        with telling(title) as tell:
            read = measured(model, [BASELINE, *(candidate for candidate, _ in group)], windows, partial(tell, title))
        for (candidate, expected), one, score in zip(group, read[1:], scores(read)[1:], strict=True):
            row = row_of(candidate.name) | {"bits": bits(model, candidate), "expected_on_parts": expected}
            row |= {key: value for key, value in asdict(score).items() if key in KEPT}
            row["kl_of_windows"] = one.kl.mean(1).tolist()
            same = ("model", "text", "name")
            found["rows"] = [old for old in found["rows"] if any(old[key] != row[key] for key in same)] + [row | here()]
        keep(args.out, found | describe())


def bits(model: Model, candidate: Candidate) -> float:
    """Of a value, scales included."""
    shapes = [shape for shape in model.bound.shapes if shape.shares is None]
    values = sum(shape.kv_heads * (shape.k_dim + shape.v_dim) for shape in shapes)
    return 8 * CacheSize.of(model.bound.shapes, candidate.format).token / values


def table(found: Document) -> str:
    """Markdown: bits and mean KL over the texts."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["model"] == model]
        lines += [f"| {model} | bits a value | " + " | ".join(TEXTS) + " |", "|---|" + "---:|" * (1 + len(TEXTS))]
        for name in sorted(dict.fromkeys(row["name"] for row in own), key=lambda name: -_of(own, name)[0]["bits"]):
            rows = _of(own, name)
            kl = {row["text"]: row["kl"] for row in rows}
            cells = " | ".join(f"{kl[text]:.2e}" if text in kl else "" for text in TEXTS)
            lines.append(f"| {name} | {rows[0]['bits']:.2f} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def draw(found: Document, path: Path) -> None:
    """KL over bits, the mean of the texts that all were measured on: a line of tuned formats, points of one format for
    all layers."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
    for plot, model in zip(axes, models, strict=True):
        own = [row for row in found["rows"] if row["model"] == model]
        of_texts = {name: {row["text"] for row in _of(own, name)} for name in {row["name"] for row in own}}
        own = [row for row in own if all(row["text"] in texts for texts in of_texts.values())]
        points = {name: _mean(_of(own, name)) for name in {row["name"] for row in own}}
        ends = [points[name] for name in ("kv4", "kv8") if name in points]
        tuned = sorted([point for name, point in points.items() if name.startswith("tuned")] + ends)
        plot.plot(*zip(*tuned, strict=True), "o-", color=LIGHT["c1"], markersize=3.5, label="tuned, layer by layer")
        uniform = {name: points[name] for name in FOR_ALL if name in points}
        plot.plot(*zip(*uniform.values(), strict=True), "s", color=LIGHT["c3"], label="one format for all layers")
        for name, point in uniform.items():
            side = {"kv8": ((-6, 4), "right")}.get(name, ((6, 4), "left"))
            plot.annotate(name, point, side[0], textcoords="offset points", color=LIGHT["c3"], ha=side[1])
        plot.set_yscale("log")
        plot.margins(0.08)
        plot.set_xlabel("bits a value, scales included")
        plot.set_title(model, loc="left", fontsize=11)
    axes[0].set_ylabel("KL from the unquantized cache, nats a token")
    axes[0].legend(frameon=False, loc="lower left")
    path.write_text(standalone(drawn(figure, "tune")))


def _of(rows: list[Document], name: str) -> list[Document]:
    return [row for row in rows if row["name"] == name]


def _mean(rows: list[Document]) -> tuple[float, float]:
    return rows[0]["bits"], sum(row["kl"] for row in rows) / len(rows)


def main() -> None:
    cli = options(__doc__, "ptb.*.txt, wikitext2.*.txt, c4_sample.jsonl", models="*")
    cli.add_argument("--parts", type=int, default=2, help="windows on which each part is measured")
    cli.add_argument("--length", type=int, default=1024, help="tokens in one of them")
    cli.add_argument("--window", type=int, default=1024)
    cli.add_argument("--windows", type=int, default=1, help="of each text")
    cli.add_argument("--uniform", nargs="*", choices=FOR_ALL, default=FOR_ALL, help="formats for all layers")
    cli.add_argument("--bits", type=float, nargs="+", default=BITS, help="sizes of tuned formats")
    cli.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    cli.add_argument("--plot", type=Path, help="an .svg file")
    args = cli.parse_args()

    found: Document = {"benchmark": "tune", "parts": {}, "rows": []}
    if args.out.is_file():
        found |= json.loads(args.out.read_text())
    for path in args.models:
        model = Model.load(path, dtype="float32")
        calibration = calibrated(model, args)
        parts = sensitivity(model, calibration, found, args)
        for text in args.texts:
            compared(model, calibration, parts, found, text, args)
        del model, calibration
    print(table(found))
    if args.plot is not None:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
