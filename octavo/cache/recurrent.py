"""What sequences hold of states: a slot each while they run, and snapshots at the ends of prefixes.

A sequence goes on from the longest snapshot of its prompt, or from zeros. On its way snapshots are taken where
`snapshots.py` says: once the forward that ends there is launched its slot is copied, and when its step is taken in the
copy can be found. A sequence that is preempted holds its last snapshot, and goes on from it as long as its blocks are
cached: one copy, which costs less than computing the block that it saves at least.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from octavo.cache.holding import Holding
from octavo.cache.snapshots import Snapshot, Snapshots, Trail
from octavo.cache.states import StatePool


class SequenceStates:
    """The slots of a pool: those of running sequences, and those of snapshots, at multiples of `unit` tokens."""

    def __init__(self, slots: StatePool, block_size: int, unit: int, findable: Callable[[bytes], bool]):
        self.slots, self.block_size = slots, block_size
        self.snapshots = Snapshots(slots.snapshots, unit, findable)
        self.computed_again = 0  # tokens of prompts whose blocks were cached, but not the states at their end
        self.coming: dict[Holding, dict[int, int]] = {}  # of a sequence, slots of snapshots by their lengths

    def start(self, holder: Holding, snapshot: Snapshot | None, cached: int) -> None:
        """A sequence starts from a snapshot; `cached` of its tokens have blocks that are cached."""
        holder.state_slot = self.slots.take()
        if snapshot is not None:
            self.slots.copy(self._of_snapshot(snapshot.slot), holder.state_slot)
        if holder.trail is None:
            holder.trail = self.snapshots.begin(snapshot, len(holder.tokens))
            self.computed_again += cached - (snapshot.length if snapshot is not None else 0)
        trail, trail.since = holder.trail, snapshot.length if snapshot is not None else 0
        trail.marks = self.snapshots.marks(trail.since, cached, len(holder.tokens))
        for length in [length for length in trail.marks if length >= trail.prompt]:
            trail.marks[length] = "answer"  # that it had said when it was preempted

    def skip(self, holder: Holding, snapshot: Snapshot | None, cached: int) -> None:
        """A sequence that has begun to compute goes on as one that starts there."""
        self.stop(holder)
        self.finish(holder)
        self.start(holder, snapshot, cached)

    def part(self, holder: Holding, waiting: Iterable[Holding]) -> None:
        """Have a sequence that starts take a snapshot where those who wait part from its prompt."""
        if (trail := holder.trail) is not None and self.snapshots.slots:
            for other in waiting:
                self._mark(trail, self._common(other.tokens, holder.tokens[: trail.prompt]), holder.num_cached)

    def until_mark(self, holder: Holding, tokens: int) -> int:
        """How many of its next `tokens` tokens a sequence computes in a step: those until a snapshot is due."""
        marks = holder.trail.marks if holder.trail is not None else ()
        return min([tokens, *(mark - holder.num_cached for mark in marks if mark > holder.num_cached)])

    def comes(self, holder: Holding, start: int, running: Sequence[Holding]) -> bool:
        """Whether one of those who run is about to compute more of a waiting sequence's prefix than the `start` tokens
        found. It takes a snapshot where they part, for which to wait costs less than to compute all that twice."""
        if not self.snapshots.slots:
            return False
        for other in running:
            if (trail := other.trail) is not None and other.num_cached < trail.prompt:
                shared = self._common(holder.tokens, other.tokens[: trail.prompt])
                if other.num_cached < shared and self._mark(trail, shared, start):
                    return True
        return False

    def launched(self, holder: Holding, length: int) -> None:
        """A forward is launched after which a sequence has the states of `length` tokens."""
        trail = holder.trail
        if trail is None or holder.state_slot is None:
            raise AssertionError("a sequence without states runs")
        answered = length >= trail.prompt and length % self.snapshots.unit == 0
        if (length in trail.marks or answered) and (slot := self.snapshots.take()) is not None:
            self.slots.copy(holder.state_slot, self._of_snapshot(slot))
            self.coming.setdefault(holder, {})[length] = slot

    def taken_in(self, holder: Holding) -> None:
        """A sequence's step is taken in: a snapshot that was copied after it can be found."""
        coming, trail = self.coming.get(holder, {}), holder.trail
        slot = coming.pop(holder.num_cached, None)
        if not coming:
            self.coming.pop(holder, None)
        if slot is not None and trail is not None:
            prefix = holder.prefixes[holder.num_cached // self.block_size - 1]
            place = trail.marks.get(holder.num_cached, "answer")
            self.snapshots.hold(trail, self.snapshots.put(slot, prefix, holder.num_cached, place, trail))

    def stop(self, holder: Holding) -> None:
        """A sequence runs no longer, for now or for ever."""
        if holder.state_slot is not None:
            self.slots.free(holder.state_slot)
            holder.state_slot = None

    def finish(self, holder: Holding) -> None:
        """A sequence has ended."""
        if holder.trail is not None:
            self.snapshots.hold(holder.trail, None)
            holder.trail = None

    def forget_coming(self, holder: Holding) -> None:
        """What was copied of a sequence is of a step that is not taken in."""
        self.snapshots.free += self.coming.pop(holder, {}).values()

    def forget_all_coming(self) -> None:
        for holder in list(self.coming):
            self.forget_coming(holder)

    def copies(self, snapshot: Snapshot | None) -> dict[str, Tensor]:
        """What a snapshot holds, by name."""
        if snapshot is None:
            return {}
        return {name: state.clone() for name, state in self.slots.of(self._of_snapshot(snapshot.slot)).items()}

    def paste(self, slot: int, states: dict[str, Tensor], prefix: bytes, length: int) -> None:
        """Have a snapshot, in the slot `slot` that was taken for it, as a conversation's that will go on."""
        for name, state in self.slots.of(self._of_snapshot(slot)).items():
            state.copy_(states[name])
        self.snapshots.put(slot, prefix, length, "prompt", Trail(length, goes_on=True))

    def check(self, holders: Sequence[Holding]) -> None:
        """Raise AssertionError unless every slot is free, of `holders`, a snapshot's, or of one to come."""
        self.slots.check([holder.state_slot for holder in holders if holder.state_slot is not None])
        self.snapshots.check([slot for coming in self.coming.values() for slot in coming.values()])

    def _mark(self, trail: Trail, shared: int, start: int) -> bool:
        """Have a turn take a snapshot where others part from it, if it saves them enough beyond the `start` found."""
        enough = shared - start >= self.snapshots.LEAST
        if enough:
            trail.marks.setdefault(shared, "shared")
        return enough

    def _of_snapshot(self, slot: int) -> int:
        """Its number in the pool."""
        return self.slots.slots + slot

    def _common(self, a: list[int], b: list[int]) -> int:
        """Tokens that both begin with, in whole units and without the last one of `a`."""
        unit = self.snapshots.unit
        low, high = 0, min(len(a) - 1, len(b)) // unit
        while low < high:
            middle = (low + high + 1) // 2
            if a[low * unit : middle * unit] == b[low * unit : middle * unit]:
                low = middle
            else:
                high = middle - 1
        return low * unit
