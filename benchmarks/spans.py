"""How many rows of its own a query should read raw: KL by own span, and what a session takes, at several contexts.

A text is read once with the unquantized cache, and its K and V are kept. Every format then gets the same rows into its
cache, and computes only the last ROWS of them before each context: a reading of 16,384 tokens costs little more than
one forward, whatever the number of formats. What is left out is that earlier rows were computed from codes too; how
much that is, other tables show (long_context.py reads every row through codes). Models are in float32, bytes are those
of raw rows in 16 bits. Rows are kept in --out after each format, and the same command goes on.

    python benchmarks/spans.py MODEL … --data ../shared/data/text --work-dir DIR --out benchmarks/results/spans.json
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from machine import describe, here
from over_models import calibrated, keep, kept, options
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.cache.size import CacheSize
from octavo.cache.store import KVCache
from octavo.cli.progress import telling
from octavo.corpus import load_texts
from octavo.engine.reading import LOGIT_ROWS, Reading
from octavo.measure.accuracy.compare import kl
from octavo.models.bound import BoundModel, Watch
from octavo.models.model import Model
from octavo.quant.format import BLOCK, KVFormat
from octavo.text_windows import consecutive_windows

ROWS = 2 * LOGIT_ROWS  # computed before each context
FORMATS = (
    "kv8", "int8-token+edges128", "int8-token+edges256", "k8v4",
    "kv4", "int4-token+edges128", "int4-token+edges256",
)  # fmt: skip

Row = dict[str, Any]


class Once:
    """A bound model that reads one text several times: the first time it keeps K and V of all rows; later it writes
    them as they are, and computes only the chunks that begin at `due`. Other chunks have no logits.

    It stands for the BoundModel in a Reading, which asks it for steps.
    """

    def __init__(self, bound: BoundModel, due: Container[int]):
        self.bound, self.due = bound, due
        self.rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in bound.layers]  # K and V of the chunks, by layer
        self.known = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bound, name)

    def step(self, cache: KVCache, batch: Batch, _: bool = False, watch: Watch | None = None) -> Tensor:
        start = int(batch.positions[0])
        every = start in self.due
        if not self.known:
            return self.bound.step(cache, batch, every, self.keep)[: len(batch.ids) * every]
        if every:
            return self.bound.step(cache, batch, every, watch)
        for layer, owner in cache.owners:
            k, v = self.rows[layer][start // LOGIT_ROWS]
            owner.write(k, v, batch.slots, batch.raw_slots)
        return torch.empty(0, self.bound.vocab_size)

    def keep(self, layer: int, _: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        self.rows[layer].append((k.clone(), v.clone()))
        return k, v, None


def session_bytes(model: Model, format: KVFormat, context: int) -> int:
    """Of a session with 16-bit raw rows."""
    shapes = [replace(shape, dtype=torch.bfloat16) for shape in model.bound.shapes]
    return CacheSize.of(shapes, format).session(context)


def measure(model: Model, rows: list[Row], args: argparse.Namespace) -> None:
    """Add the rows of the formats that are missing, and keep them after each."""
    contexts = [context for context in args.contexts if context <= model.bound.max_context]
    how = {"model": model.path.name, "text": args.text, "rows": ROWS}
    known = {(row["name"], row["context"]) for row in rows if how.items() <= row.items()}
    missing = [name for name in args.formats if any((name, context) not in known for context in contexts)]
    if not missing:
        return
    calibration = calibrated(model, args)
    [window] = consecutive_windows(load_texts(args.text, args.data, "test"), model.tokenizer, max(contexts), 1)
    due = [start for context in contexts for start in range(context - ROWS, context, LOGIT_ROWS)]
    once: Any = Once(model.bound, due)  # behaves as a BoundModel
    with telling(f"{model.path.name}: unquantized") as tell:

        def read(what: str, reading: Reading) -> Iterator[tuple[int, Tensor]]:
            """Log-probabilities of the chunks that are due, by their first row."""
            for i, logits in enumerate(reading.logits(window)):
                if i * LOGIT_ROWS in due:
                    yield i * LOGIT_ROWS, logits.log_softmax(-1)
                tell(f"{model.path.name}: {what}", min((i + 1) * LOGIT_ROWS, len(window)), len(window))

        base = dict(read("unquantized", Reading(once)))
        once.known = True
        for name in missing:
            own = read(name, Reading(once, KVFormat.parse(name), calibration))
            losses = {start: kl(base[start], logprobs).double() for start, logprobs in own}
            for context in contexts:
                parts = torch.cat([loss for start, loss in losses.items() if context - ROWS <= start < context])
                blocks = parts.view(-1, BLOCK).mean(1)  # neighbours are not independent
                found = {"kl": parts.mean().item(), "kl_error": (blocks.std() / len(blocks) ** 0.5).item()}
                size = session_bytes(model, KVFormat.parse(name), context)
                rows.append(how | {"name": name, "context": context, "bytes": size} | found | here())
            keep(args.out, {"benchmark": "spans", **describe(), "rows": rows})


def table(rows: Sequence[Row]) -> str:
    """Markdown: of each model what a session takes, and KL, at each context."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        contexts = sorted({row["context"] for row in own})
        heads = [f"{context:,}: MiB | KL" for context in contexts]
        lines += [f"| {model} | {' | '.join(heads)} |", "|---|" + "---:|" * (2 * len(contexts))]
        for name in dict.fromkeys(row["name"] for row in own):
            at = {row["context"]: row for row in own if row["name"] == name}
            cells = (f"{at[c]['bytes'] / 2**20:.1f} | {at[c]['kl']:.2e}" if c in at else " | " for c in contexts)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).strip()


def main() -> None:
    cli = options(__doc__, "ptb.*.txt, wikitext2.*.txt")
    cli.add_argument("--text", default="wikitext2")
    cli.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384])
    cli.add_argument("--formats", nargs="+", default=FORMATS)
    args = cli.parse_args()

    rows = kept(args.out)
    for path in args.models:
        measure(Model.load(path, dtype="float32"), rows, args)
    print(table(rows))


if __name__ == "__main__":
    main()
