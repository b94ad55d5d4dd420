"""What a prefix cache with snapshots finds of four traces, by where snapshots are taken and which goes first.

Requests are served one after the other by the very class that decides in the engine (octavo/cache/snapshots.py), and by
candidates that differ from it in one thing. Blocks are never evicted here, so that what is not found is not found for
want of a snapshot alone. The most there is to find is what other requests' whole blocks hold.

    python benchmarks/snapshots.py    # writes benchmarks/results/snapshots.json and docs/SNAPSHOTS.md's tables
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from machine import describe
from memory import table
from traces import TRACES, Request, with_small

from octavo.cache.blocks import prefix_hash
from octavo.cache.snapshots import Place, Segment, Snapshot, Snapshots

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "SNAPSHOTS.md"
SLOTS = (8, 16, 32, 64, 128)
UNLIMITED = 5000
SHOWN = 32  # slots of the table by trace
NEVER = 1 << 40


class Recent(Snapshots):
    """The least recently used goes first."""

    KEPT = 0.0

    def _into(self, segment: Segment, snapshot: Snapshot) -> None:
        super()._into(segment, snapshot)
        snapshot.rank = (0, snapshot.rank[1])


class ConversationsApart(Recent):
    """So does here, but conversations and shared beginnings have half of the slots for themselves."""

    KEPT = 1 / 2


class Length(Snapshots):
    """Age and length: what a snapshot would save if there were no other."""

    KEPT = 0.0

    def _into(self, segment: Segment, snapshot: Snapshot) -> None:
        super()._into(segment, snapshot)
        snapshot.rank = (segment.age + snapshot.length, snapshot.rank[1])


class OnePart(Snapshots):
    KEPT = 0.0


class HalfKept(Snapshots):
    KEPT = 1 / 2


class MostKept(Snapshots):
    KEPT = 3 / 4


class PromptsAlone(Snapshots):
    """Serving leaves the answers' out."""


class AnswersAlone(Snapshots):
    def marks(self, start: int, shared: int, prompt: int) -> dict[int, Place]:
        return {at: place for at, place in super().marks(start, shared, prompt).items() if place != "prompt"}


class NothingShared(Snapshots):
    def marks(self, start: int, shared: int, prompt: int) -> dict[int, Place]:  # noqa: ARG002
        return super().marks(start, 0, prompt)


class NoInner(Snapshots):
    EVERY = NEVER


class Every1024(Snapshots):
    EVERY = 1024


class Least64(Snapshots):
    LEAST = 64


class Least512(Snapshots):
    LEAST = 512


ORDERS: dict[str, type[Snapshots]] = {
    "least recently used": Recent,
    "the same, half kept for conversations": ConversationsApart,
    "age + length": Length,
    "age + worth": OnePart,
    "**age + worth, a third kept**": Snapshots,
    "age + worth, half kept": HalfKept,
    "age + worth, three quarters kept": MostKept,
}
PLACES: dict[str, type[Snapshots]] = {
    "**all**": Snapshots,
    "no ends of answers": PromptsAlone,
    "no ends of prompts": AnswersAlone,
    "no shared beginnings": NothingShared,
    "long prompts: none within": NoInner,
    "long prompts: every 1024": Every1024,
    "from 64 tokens on": Least64,
    "from 512 tokens on": Least512,
}


@dataclass(frozen=True)
class Found:
    """Shares of the prompts' tokens, small requests left out, and snapshots taken for each request."""

    found: float
    most: float
    taken: float


class Trace:
    """Requests with the hashes of their whole blocks, the answer's included."""

    def __init__(self, requests: Sequence[Request], unit: int = 64):
        self.unit = unit
        self.requests = [(request, list(self._hashes(request.prompt + request.answer))) for request in requests]

    def _hashes(self, tokens: list[int]) -> Iterable[bytes]:
        parent = None
        for start in range(0, (len(tokens) - 1) // self.unit * self.unit, self.unit):
            parent = prefix_hash(parent, tokens[start : start + self.unit])
            yield parent

    def serve(self, snapshots: Snapshots) -> Found:
        cached: set[bytes] = set()
        found = most = taken = asked = served = 0
        for request, hashes in self.requests:
            whole = hashes[: (len(request.prompt) - 1) // self.unit]
            shared = next((i for i, prefix in enumerate(whole) if prefix not in cached), len(whole))
            hit = next((snapshots.by_prefix[p] for p in reversed(whole[:shared]) if p in snapshots.by_prefix), None)
            start = hit.length if hit else 0
            if not request.small:
                found, most = found + start, most + shared * self.unit
                asked, served = asked + len(request.prompt), served + 1
            taken += self._take(snapshots, hit, start, shared * self.unit, request, hashes)
            cached.update(hashes)
        snapshots.check([])
        return Found(found / asked, most / asked, taken / served)

    def _take(
        self, snapshots: Snapshots, hit: Snapshot | None, start: int, shared: int, request: Request, hashes: list[bytes]
    ) -> int:
        trail = snapshots.begin(hit, len(request.prompt))
        trail.since = start
        marks = sorted(snapshots.marks(start, shared, len(request.prompt)).items())
        end = len(hashes) * self.unit
        if end > len(request.prompt) and end > start and not isinstance(snapshots, PromptsAlone):
            marks.append((end, "answer"))
        for length, place in marks:
            slot = snapshots.take()
            assert slot is not None, "one request at a time holds nothing"
            snapshots.put(slot, hashes[length // self.unit - 1], length, place, trail)
        return len(marks)


def measure(names: dict[str, type[Snapshots]], traces: dict[str, Trace]) -> dict[str, dict[str, dict[str, Found]]]:
    """By candidate, trace and number of slots."""
    found: dict[str, dict[str, dict[str, Found]]] = {}
    for name, kind in names.items():
        found[name] = {}
        for trace, requests in traces.items():
            found[name][trace] = {
                str(slots): requests.serve(kind(slots, requests.unit)) for slots in (*SLOTS, UNLIMITED)
            }
        print(name, flush=True)
    return found


def written(found: dict[str, dict[str, dict[str, Found]]]) -> dict[str, dict[str, str]]:
    """Of each candidate and trace what was found by number of slots, what there was, and how many were taken, a line
    each."""

    def line(of: dict[str, Found]) -> str:
        shares = ", ".join(f"{slots}: {one.found:.4f}" for slots, one in of.items())
        last = of[str(UNLIMITED)]
        return f"{shares}, most: {last.most:.4f}, taken for each request: {last.taken:.2f}"

    return {name.strip("*"): {trace: line(one) for trace, one in of.items()} for name, of in found.items()}


def by_slots(found: dict[str, dict[str, dict[str, Found]]]) -> str:
    def row(name: str) -> list[str]:
        of_most = [[of[str(slots)].found / of[str(slots)].most for of in found[name].values()]
                   for slots in (*SLOTS, UNLIMITED)]  # fmt: skip
        return [name, *(f"{sum(shares) / len(shares):.2f}" for shares in of_most)]

    return table(["", *(f"{slots} slots" for slots in SLOTS), "unlimited"], map(row, found))


def by_trace(found: dict[str, dict[str, dict[str, Found]]]) -> str:
    traces = list(next(iter(found.values())))
    most = ["the most there is", *(f"{next(iter(found.values()))[trace][str(SHOWN)].most:.2f}" for trace in traces)]
    rows = [[name, *(f"{found[name][trace][str(SHOWN)].found:.2f}" for trace in traces)] for name in found]
    return table(["", *traces], [*rows, most])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "snapshots.json")
    out = parser.parse_args().out
    requests = {name: make() for name, make in TRACES.items()}
    requests |= {f"{name}, small ones between": with_small(of) for name, of in requests.items()}
    traces = {name: Trace(of) for name, of in requests.items()}
    orders, places = measure(ORDERS, traces), measure(PLACES, traces)
    about = {
        name: {"requests": len(of), "mean prompt": round(sum(len(r.prompt) for r in of) / len(of))}
        for name, of in requests.items()
    }
    results = {"machine": describe(), "traces": about, "orders": written(orders), "places": written(places)}
    out.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    for name, text in {"orders": by_slots(orders), "traces": by_trace(orders), "places": by_slots(places)}.items():
        page = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.S
        )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
