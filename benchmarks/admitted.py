"""How many sessions a cache of 48 MiB holds: computed as `octavo plan` does, and admitted by an engine that has it.

Of each format an engine with a cache of that size takes sessions that begin differently and fill the context, up to
the first that it cannot hold beside the others. This ends with an error where they are not as many as computed, or
where a cache of so many sessions takes another number of bytes than `octavo memory` says.

    python benchmarks/admitted.py MODEL … --data ../shared/data/text --out benchmarks/results/admitted.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from machine import describe
from over_models import calibrated, keep, options

from octavo import LLM
from octavo.cache.holding import Holding
from octavo.measure.memory.costs import costs
from octavo.models.geometry import Geometry
from octavo.models.model import Model
from octavo.quant.format import KVFormat

FORMATS = ("bf16", "int8", "kv8", "k8v4", "kv4")
MEMORY = 48 << 20

Row = dict[str, Any]


def admitted(llm: LLM, context: int) -> int:
    """Sessions of `context` tokens, no two of which begin alike, that the engine's pool holds at a time."""
    pool, held = llm.engine.pool, []
    while len(held) < llm.engine.scheduler.max_batch_size:
        tokens = [len(held)] * context
        session = Holding(tokens=tokens)
        pool.start(session, pool.match(tokens))
        held.append(session)
        if not pool.reserve(session, context):
            break
    full = sum(len(session.tables[0]) == pool.blocks_for(context) for session in held)
    pool.check_held(held)
    for session in held:
        pool.free_all(session)
    return full


def measure(model: Model, args: argparse.Namespace) -> list[Row]:
    geometry, calibration, rows = Geometry.trace(model.path, "bf16"), calibrated(model, args), []
    for name in FORMATS:
        format, context = KVFormat.parse(name), args.context
        [cost] = costs(geometry, [format], context, geometry.weights + MEMORY)

        def llm(sessions: int, memory: int | None, format: KVFormat = format, context: int = context) -> LLM:
            own = calibration if format.takes_calibration else None
            sizes: dict[str, Any] = {"session_len": context, "max_batch_size": sessions, "kv_cache_memory": memory}
            return LLM(model, format, calibration=own, **sizes)

        most = max(admitted(llm(sessions, MEMORY), context) for sessions in (cost.sessions, cost.sessions + 1))
        nbytes = llm(cost.sessions, None).cache.nbytes
        assert most == cost.sessions, f"{most} sessions were admitted in {name}, {cost.sessions} computed"
        assert nbytes == cost.cache(most), f"{nbytes} bytes in {name}, {cost.cache(most)} computed"
        rows.append({
            "model": model.path.name, "name": name, "context": context, "memory": MEMORY, "sessions": most,
            "nbytes": nbytes,
        })  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = ["| sessions in 48 MiB | " + " | ".join(f"`{name}`" for name in FORMATS) + " |"]
    lines.append("|---|" + "---:|" * len(FORMATS))
    for model, context in dict.fromkeys((row["model"], row["context"]) for row in rows):
        own = {row["name"]: row for row in rows if (row["model"], row["context"]) == (model, context)}
        lines.append(f"| {model}, {context:,} tokens | {' | '.join(str(own[name]['sessions']) for name in FORMATS)} |")
    return "\n".join(lines)


def main() -> None:
    cli = options(__doc__, "ptb.*.txt")
    cli.add_argument("--context", type=int, default=2048)
    args = cli.parse_args()

    rows = [row for path in args.models for row in measure(Model.load(path, dtype="bf16"), args)]
    keep(args.out, {"benchmark": "admitted", **describe(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
