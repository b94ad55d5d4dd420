"""Snapshots: copies of the states that some layers keep beside K and V, taken at the ends of prefixes.

A state stands for all tokens before it and cannot be cut back, so a prefix is found where its blocks are cached and a
snapshot was taken at its end. All snapshots are of one size, each as large as many blocks: where they are taken and
which makes room for the next decides what is found. `benchmarks/snapshots.py` measures that.

    prompt [ found ······| in others' blocks ·|···········|·············· last whole block | rest ]  answer ····|··· ]
    taken at                                  ↑           ↑ every so many tokens           ↑                    ↑ last

The one whose loss costs least goes first: what a snapshot is worth is the tokens that would be computed again, plus the
age of its segment, which is what the last one that had to go was worth. So of two that save as much the least recently
used goes first, and nothing stays that is not used.

    worth   the last one of a prompt, and a shared beginning that was found again: all of its tokens
            others, and those of a turn that a later one has gone on from: its tokens since the snapshot before it

Conversations (a turn that began with an earlier turn's snapshot) and shared beginnings found again have a segment of
their own, up to a third of the slots, with an age of its own. They only make room for each other, however many small
requests come in between; and what a running sequence holds never goes. Pure Python: numbers of slots, no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

EACH = 2  # snapshots for each running sequence, unless said otherwise

Place = Literal["inner", "shared", "prompt", "answer"]


@dataclass(eq=False)
class Trail:
    """A request, as far as its snapshots are concerned."""

    prompt: int  # tokens
    after: Trail | None = None  # the turn it goes on from, until it has snapshots of its own
    goes_on: bool = False
    over: bool = False  # a later turn has gone on, and has snapshots of its own
    snapshots: list[Snapshot] = field(default_factory=list)
    # While it runs:
    marks: dict[int, Place] = field(default_factory=dict)  # lengths at which a snapshot within its prompt is due
    since: int = 0  # the length at which the last one on its way was taken, ends of answers left out
    last: Snapshot | None = None  # the last one that it took, which it holds


@dataclass(eq=False)
class Snapshot:
    slot: int
    prefix: bytes  # hash of the tokens that it stands for
    length: int  # their number
    saves: int  # of these, those since the snapshot before it
    place: Place
    trail: Trail
    found: bool = False
    held: int = 0  # by so many running sequences
    segment: Segment | None = None
    rank: tuple[float, int] = (0, 0)  # the lowest of a segment goes first

    @property
    def worth(self) -> int:
        whole = self.found if self.place == "shared" else self.place == "prompt" and not self.trail.over
        return self.length if whole else self.saves

    @property
    def is_kept(self) -> bool:
        if self.place == "shared":
            return self.found
        return self.place != "inner" and self.trail.goes_on and not self.trail.over


class Segment:
    """Snapshots that make room for each other."""

    def __init__(self) -> None:
        self.age = 0.0
        self.snapshots: set[Snapshot] = set()

    def first(self) -> Snapshot | None:
        """The one to go first."""
        return min((s for s in self.snapshots if not s.held), key=lambda s: s.rank, default=None)


class Snapshots:
    """What is known of `slots` slots. `unit` is what lengths are multiples of, in tokens; `findable` tells whether the
    blocks of a prefix are still cached."""

    EVERY = 4096  # tokens from one snapshot of a long prompt to the next
    LEAST = 128  # tokens that a snapshot within a prompt saves at least: its step is cut in two there
    KEPT = 1 / 3  # share of the slots that conversations and shared beginnings have for themselves

    def __init__(self, slots: int, unit: int, findable: Callable[[bytes], bool] = lambda _: True):
        self.slots, self.unit, self.findable = slots, unit, findable
        self.free = list(reversed(range(slots)))
        self.by_prefix: dict[bytes, Snapshot] = {}
        self.tried, self.kept = Segment(), Segment()
        self.uses = 0

    @property
    def held(self) -> int:
        """Snapshots that running sequences hold."""
        return sum(snapshot.held > 0 for snapshot in self.by_prefix.values())

    def begin(self, snapshot: Snapshot | None, prompt: int) -> Trail:
        """A request of `prompt` tokens begins, with that snapshot."""
        if snapshot is None:
            return Trail(prompt)
        snapshot.found = True
        if snapshot.trail.over:  # gone on from once more: what requests share ends here
            snapshot.place = "shared"
        self._place(snapshot)
        before = snapshot.trail if snapshot.place in ("prompt", "answer") else None
        if before is None or prompt <= before.prompt:  # no longer: the same one asked again
            return Trail(prompt)
        return Trail(prompt, before, goes_on=True)

    def marks(self, start: int, shared: int, prompt: int) -> dict[int, Place]:
        """Lengths at which to take snapshots of a prompt: `start` of its tokens were found, and `shared` are cached but
        for their states."""
        last, every = (prompt - 1) // self.unit * self.unit, max(1, self.EVERY // self.unit) * self.unit
        found: dict[int, Place] = dict.fromkeys(range((start // every + 1) * every, last, every), "inner")
        if shared - start >= self.LEAST:
            found[shared // self.unit * self.unit] = "shared"
        if last - start >= self.LEAST:
            found[last] = "prompt"
        return found

    def take(self) -> int | None:
        """A slot to put a snapshot in, maybe that of another, which is forgotten; None if none may go."""
        if not self.free:
            self.drop_lost()
        if not self.free and (victim := self.tried.first()) is not None:
            self.tried.age = victim.rank[0]
            self.drop(victim)
        return self.free.pop() if self.free else None

    def put(self, slot: int, prefix: bytes, length: int, place: Place, trail: Trail) -> Snapshot:
        """What `slot` holds stands for that prefix from now on. Where another does already that one stays, and the slot
        is free again."""
        snapshot = self.by_prefix.get(prefix)
        if snapshot is None:
            snapshot = self.by_prefix[prefix] = Snapshot(slot, prefix, length, length - trail.since, place, trail)
            trail.snapshots.append(snapshot)
        else:
            self.free.append(slot)
        if place != "answer":
            trail.since = length
        if trail.after is not None and place != "inner":
            trail.after.over = True
            for other in trail.after.snapshots:
                self._place(other)
            trail.after = None
        self._place(snapshot)
        return snapshot

    def hold(self, trail: Trail, snapshot: Snapshot | None) -> None:
        """A running turn holds this one, and no longer the one before it, which is forgotten if it was at the end of
        what had been answered by then."""
        before, trail.last = trail.last, snapshot
        if snapshot is not None:
            snapshot.held += 1
        if before is not None:
            before.held -= 1
            passed = snapshot is not None and before.place == "answer" and not before.found
            if passed and before is not snapshot and not before.held:
                self.drop(before)

    def drop(self, snapshot: Snapshot) -> None:
        """Forget a snapshot."""
        assert snapshot.segment is not None, "a snapshot is forgotten twice"
        del self.by_prefix[snapshot.prefix]
        snapshot.segment.snapshots.remove(snapshot)
        snapshot.trail.snapshots.remove(snapshot)
        snapshot.segment = None
        self.free.append(snapshot.slot)

    def drop_lost(self) -> None:
        """Forget those whose blocks are not cached any more, so that nobody can find them."""
        for snapshot in list(self.by_prefix.values()):
            if not snapshot.held and not self.findable(snapshot.prefix):
                self.drop(snapshot)

    def clear(self) -> None:
        """Forget all that no running sequence holds."""
        for snapshot in list(self.by_prefix.values()):
            if not snapshot.held:
                self.drop(snapshot)

    def check(self, taken: Sequence[int]) -> None:
        """Raise AssertionError unless every slot is free, a snapshot's, or `taken` for one to come."""
        slots = [*self.free, *taken, *(snapshot.slot for snapshot in self.by_prefix.values())]
        assert sorted(slots) == list(range(self.slots)), "the slot of a snapshot leaked"
        assert self.tried.snapshots | self.kept.snapshots == set(self.by_prefix.values()), "a snapshot is in no segment"
        assert len(self.kept.snapshots) <= self.KEPT * self.slots, "too many snapshots are kept"

    def _place(self, snapshot: Snapshot) -> None:
        """Have it in its segment, as the one used last."""
        if snapshot.segment is not None:
            snapshot.segment.snapshots.remove(snapshot)
        self._into(self.kept if snapshot.is_kept else self.tried, snapshot)
        if len(self.kept.snapshots) > self.KEPT * self.slots:
            oldest = min(self.kept.snapshots, key=lambda s: s.rank)
            self.kept.snapshots.remove(oldest)
            self.kept.age = oldest.rank[0]
            self._into(self.tried, oldest)

    def _into(self, segment: Segment, snapshot: Snapshot) -> None:
        self.uses += 1
        snapshot.segment, snapshot.rank = segment, (segment.age + snapshot.worth, self.uses)
        segment.snapshots.add(snapshot)
