"""A scheduler with a shadow cache of plain numbers in the place of K and V.

`Shadow` plays the rest of the engine. What it "computes" for a slot is the whole prefix that ends there, what it
"attends to" must be exactly that, and the token it "samples" is a function of all tokens before it. So any block that
is handed out twice, overwritten while shared, found under a wrong hash or left unwritten shows at once.
"""

from __future__ import annotations

import zlib

from octavo.cache.blocks import BlockPool
from octavo.cache.edges import EdgePool
from octavo.cache.pool import CachePool
from octavo.cache.states import StatePlan, StatePool
from octavo.engine.params import SamplingParams
from octavo.engine.scheduler import Scheduler, Work
from octavo.engine.sequence import Sampled, Sequence


def next_token(tokens: list[int], vocabulary: int = 8) -> int:
    return zlib.crc32(bytes(tokens)) % vocabulary


class ShadowStates(StatePool):
    """Slots that remember, in the place of states, the tokens that these would be of."""

    def __init__(self, slots: int, snapshots: int):
        super().__init__(StatePlan(), slots, snapshots)
        self.known: dict[int, tuple[int, ...]] = {}

    def clear(self, slot: int) -> None:
        self.known[slot] = ()

    def copy(self, source: int, to: int) -> None:
        self.known[to] = self.known[source]


class Shadow(Scheduler):
    """A scheduler with a cache that remembers, for each slot, the prefix whose K and V it would hold."""

    def __init__(
        self,
        blocks: int = 16,
        block_size: int = 4,
        batch: int = 4,
        budget: int = 16,
        context: int = 1000,
        hits: bool = True,
        reach: int | None = None,
        windows: tuple[int, ...] = (),
        snapshots: int | None = None,
        ring: int = 0,
    ):
        """`reach` of group 0, and of further groups. With `snapshots` there are states, and room for so many of them;
        they are taken wherever they save a block. With `ring` there are raw pages, so many for a sequence's own span,
        and one first page more than there are sequences."""
        self.states = None if snapshots is None else ShadowStates(batch, snapshots)
        groups = [BlockPool(blocks, block_size, hits, window) for window in (reach, *windows)]
        edges = EdgePool(ring * block_size, block_size, batch * (ring + 1) + 1, batch, hits) if ring else None
        pool = CachePool(groups, edges, self.states)
        if pool.states is not None:
            pool.states.snapshots.LEAST, pool.states.snapshots.EVERY = block_size, 4 * block_size
        super().__init__(pool, batch, budget, context)
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}  # by group and slot
        self.raw: dict[int, tuple[int, ...]] = {}  # by slot of the raw pages
        self.order: list[Sequence] = []  # by their first tokens
        self.unique = 99  # the token that prompts without content were last made of

    def request(
        self, prompt: list[int] | int, max_tokens: int = 1000, stop_ids: frozenset[int] = frozenset()
    ) -> Sequence:
        """Queue a sequence; a number n stands for a prompt of n tokens that no other prompt shares."""
        if isinstance(prompt, int):
            self.unique += 1
            prompt = [self.unique] * prompt
        sequence = Sequence(prompt, SamplingParams(max_tokens=max_tokens), stop_ids)
        self.add(sequence)
        return sequence

    def step(self, token: int | None = None) -> Work:
        """One step, checked on both sides of the commit; `token` is sampled by all, else a function of the prefix."""
        running = list(self.running)
        work = self.schedule()
        self.check()
        self._check_work(work, running)
        for group, pool in enumerate(self.pool.groups):
            for sequence, n in work:
                for i in range(sequence.num_cached, sequence.num_cached + n):
                    self.slots[self._slot(sequence, group, i)] = tuple(sequence.tokens[: i + 1])
            for sequence, n in work:
                oldest = 0 if pool.reach is None else max(0, sequence.num_cached - pool.reach + 1)
                for i in range(oldest, sequence.num_cached + n):
                    assert self.slots[self._slot(sequence, group, i)] == tuple(sequence.tokens[: i + 1]), (
                        f"position {i} is another's"
                    )
        for sequence, n in work if self.pool.edges is not None else ():
            for i in self._raw(sequence):
                assert self.raw[self._raw_slot(sequence, i)] == tuple(sequence.tokens[: i + 1]), f"{i}: another's row"
            for i in range(sequence.num_cached, sequence.num_cached + n):
                self.raw[self._raw_slot(sequence, i)] = tuple(sequence.tokens[: i + 1])
        if self.states is not None:
            for sequence, n in work:
                known = tuple(sequence.tokens[: sequence.num_cached])
                assert self.states.known[sequence.state_slot] == known, "states of another prefix"
                self.states.known[sequence.state_slot] = tuple(sequence.tokens[: sequence.num_cached + n])
        self.launched(work)
        due = [sequence for sequence, n in work if n == sequence.pending]
        self.order += [sequence for sequence in due if not sequence.output]
        gained = self.commit(work, [Sampled(next_token(s.tokens) if token is None else token) for s in due])
        assert gained == due
        self.check()
        return work

    def run(self, limit: int = 10_000) -> int:
        """Step until nothing is left; returns how many steps it took."""
        for steps in range(limit):
            if not (self.running or self.waiting):
                assert not self.pool.groups[0].used
                assert self.states is None or not (self.pool.states.snapshots.held or self.pool.states.coming)
                return steps
            self.step()
        raise AssertionError(f"not done after {limit} steps")

    def _slot(self, sequence: Sequence, group: int, position: int) -> tuple[int, int]:
        size = self.pool.block_size
        return group, sequence.tables[group][position // size] * size + position % size

    def _raw(self, sequence: Sequence) -> set[int]:
        """Positions of the stored rows that the next query reads raw: those of page 0 and of its own span."""
        size, stored = self.pool.block_size, sequence.num_cached
        span = self.pool.edges.ring_pages * size
        return {*range(min(size, stored)), *range(stored // span * span, stored)}

    def _raw_slot(self, sequence: Sequence, position: int) -> int:
        size = self.pool.block_size
        if position < size:
            return sequence.first_page * size + position
        return sequence.ring * size + position % (self.pool.edges.ring_pages * size)

    def _check_work(self, work: Work, before: list[Sequence]) -> None:
        assert work, "a step without work"
        assert sum(n for _, n in work) <= self.max_batch_tokens
        assert len(self.running) <= self.max_batch_size
        assert [s for s in self.running if s in [w for w, _ in work]] == [s for s, _ in work], (
            "not oldest first, or twice"
        )
        size = self.pool.block_size
        for sequence, n in work:
            assert 1 <= n <= sequence.pending
            assert sequence in self.running
            end = sequence.num_cached + n
            for pool, table in zip(self.pool.groups, sequence.tables, strict=True):
                assert len(table) == -(-end // size) or sequence in before, "blocks ahead of need"
                assert len(table) * size >= end, "no room for what is computed"
                for block in table[sequence.num_cached // size :]:
                    assert pool.blocks[block].references == 1, "a shared block is written"


def alone(prompt: list[int], max_len: int, stop_ids: frozenset[int] = frozenset()) -> list[int]:
    """What a sequence must generate whatever happens around it."""
    tokens = list(prompt)
    while len(tokens) < max_len:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]
