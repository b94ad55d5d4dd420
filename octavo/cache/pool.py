"""What running sequences hold of a cache: blocks for every group of layers, raw pages at the edges, a slot of states.

Layers whose queries see equally far back are a group. It has blocks and block tables of its own, and blocks that lie
behind its reach are given back while the sequence runs:

    group 0, the widest reach      [ 0 | 1 | 2 | 3 | 4 | 5 | 6 ]
    a group of a sliding window    [ · | · | · | · | 4 | 5 | 6 ]      · given back, maybe another sequence's by now

A prefix is found where every group still has the blocks that a query at its end sees, so in a group with a window its
last blocks are enough. Pure Python, no tensors but those that the pool of states clears.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from octavo.cache.blocks import GONE, BlockPool, prefix_hash
from octavo.cache.edges import EdgePool
from octavo.cache.holding import Holding
from octavo.cache.recurrent import SequenceStates
from octavo.cache.snapshots import Snapshot
from octavo.cache.states import StatePool


@dataclass(frozen=True)
class Hit:
    """Whole blocks of a prompt that are cached. The sequence that starts on them has the lists for its own."""

    prefixes: list[bytes]  # the hash of the prefix that each of them ends
    tables: list[list[int]]  # of each group, GONE where no query at their end sees a block
    snapshot: Snapshot | None = None  # of the states at their end, where there are states
    cached: int = 0  # blocks that are cached, those beyond the snapshot included
    lacks_first: bool = False  # whether there are more, which need a first page that is no longer there

    def __len__(self) -> int:
        return len(self.prefixes)


class CachePool:
    """The blocks of all groups, the widest reach first, the raw pages and the slots of states of a cache."""

    def __init__(self, groups: Sequence[BlockPool], edges: EdgePool | None = None, states: StatePool | None = None):
        self.groups, self.edges = groups, edges
        self.block_size, self.prefix_caching = groups[0].block_size, groups[0].prefix_caching
        self._whole = 1 if edges is None else edges.ring_pages  # blocks that a hit consists of multiples of
        unit = self.block_size * self._whole
        self.states = SequenceStates(states, self.block_size, unit, self._findable) if states is not None else None

    @property
    def capacity(self) -> int | None:
        """The longest sequence in tokens; None where any fits, since no group keeps all of it."""
        widest = self.groups[0]
        return None if widest.reach is not None else len(widest) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need in a group that keeps all."""
        return self.groups[0].blocks_for(tokens)

    def prefix_blocks(self, tokens: Sequence[int]) -> int:
        """Most blocks that a hit on `tokens` can have: whole ones, with edges whole spans, and never that of the last
        token, whose logits are still to be computed; and a shared block is never written."""
        return max(0, len(tokens) - 1) // (self.block_size * self._whole) * self._whole

    def prefixes(self, tokens: Sequence[int]) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        """Of each block that a hit on `tokens` can have, the hash of the prefix that it ends, and its own tokens."""
        parent, size = None, self.block_size
        for start in range(0, self.prefix_blocks(tokens) * size, size):
            own = tuple(tokens[start : start + size])
            parent = prefix_hash(parent, own)
            yield parent, own

    def find(self, tokens: Sequence[int], has_first: bool = False) -> Hit:
        """The longest cached prefix of `tokens`. With edges it is whole spans, and its first page is there, or the
        caller's own."""
        prefixes: list[bytes] = []
        found: list[list[int | None]] = [[] for _ in self.groups]
        for prefix, own in self.prefixes(tokens) if self.prefix_caching else ():
            blocks = [pool.lookup(prefix, own) for pool in self.groups]
            if any(block is None and pool.reach is None for block, pool in zip(blocks, self.groups, strict=True)):
                break
            prefixes.append(prefix)
            for table, block in zip(found, blocks, strict=True):
                table.append(block)
        count = len(prefixes) // self._whole * self._whole
        lacks_first = self.edges is not None and count > 0 and not has_first and self.edges.find(tokens) is None
        if lacks_first:
            count = 0

        def lacks(count: int) -> bool:  # only blocks behind a window may be gone
            return any(
                pool.reach is not None and None in table[pool.behind(count * self.block_size) : count]
                for table, pool in zip(found, self.groups, strict=True)
            )

        while lacks(count):
            count -= self._whole
        cached, snapshot = count, None
        if self.states is not None:
            by_prefix = self.states.snapshots.by_prefix
            while count and (prefixes[count - 1] not in by_prefix or lacks(count)):
                count -= self._whole
            snapshot = by_prefix[prefixes[count - 1]] if count else None
        tables = []
        for table, behind in zip(found, self.behinds(count), strict=True):
            tables.append([GONE] * behind + [block for block in table[behind:count] if block is not None])
        return Hit(prefixes[:count], tables, snapshot, cached, lacks_first)

    def behinds(self, count: int) -> list[int]:
        """Of each group, how many of the first `count` blocks no query after them sees."""
        return [pool.behind(count * self.block_size) for pool in self.groups]

    def match(self, tokens: Sequence[int], has_first: bool = False) -> Hit:
        """As `find`, with a reference on each block."""
        hit = self.find(tokens, has_first)
        for pool, table, behind in zip(self.groups, hit.tables, self.behinds(len(hit)), strict=True):
            pool.share(table[behind:])
        return hit

    def unmatch(self, hit: Hit) -> None:
        """Give back what `match` took."""
        for pool, table, behind in zip(self.groups, hit.tables, self.behinds(len(hit)), strict=True):
            pool.release(table[behind:])

    def start(self, holder: Holding, hit: Hit) -> None:
        """Let a sequence that holds nothing start on a hit, whose references become its own."""
        if self.edges is not None:
            holder.first_page, holder.ring = self.edges.take(holder.tokens, bool(hit))
        self._take_over(holder, hit)
        if self.states is not None:
            self.states.start(holder, hit.snapshot, hit.cached * self.block_size)

    def skip(self, holder: Holding) -> bool:
        """Let a sequence that has computed its first page go on from what else is cached of its prefix; False if there
        is no more. First pages are few, and so most are gone before the blocks behind them."""
        hit = self.match(holder.tokens, has_first=True)
        if len(hit) * self.block_size <= holder.num_cached:
            self.unmatch(hit)
            return False
        self._release(holder)
        self._take_over(holder, hit)
        if self.states is not None:
            self.states.skip(holder, hit.snapshot, hit.cached * self.block_size)
        return True

    def lacking(self, holder: Holding, tokens: int) -> list[int]:
        """How many more blocks of each group a sequence needs to hold `tokens` tokens."""
        return [self.blocks_for(tokens) - len(table) for table in holder.tables]

    def reserve(self, holder: Holding, tokens: int) -> bool:
        """Give back what lies behind, and extend the block tables for `tokens` more tokens. If there are too few
        blocks, none is taken, and it is False."""
        for i, pool in enumerate(self.groups):
            holder.behind[i] = pool.let_go(holder.tables[i], holder.behind[i], holder.num_cached)
        needed = self.lacking(holder, holder.num_cached + tokens)
        if any(count > len(pool.free) for count, pool in zip(needed, self.groups, strict=True)):
            return False
        for count, pool, table in zip(needed, self.groups, holder.tables, strict=True):
            table += [pool.take() for _ in range(count)]
        return True

    def seal_full(self, holder: Holding) -> None:
        """Make a sequence's blocks that have become full findable."""
        size = self.block_size
        while (len(holder.prefixes) + 1) * size <= holder.num_cached:
            i = len(holder.prefixes)
            parent = holder.prefixes[-1] if i else None
            own = holder.tokens[i * size : (i + 1) * size]
            for pool, table, behind in zip(self.groups, holder.tables, holder.behind, strict=True):
                if i >= behind:
                    pool.seal(table[i], parent, own)
            holder.prefixes.append(prefix_hash(parent, own))
            if self.edges is not None and i == 0:
                self.edges.seal(holder.first_page, own)

    def free_all(self, holder: Holding) -> None:
        """Take back all that a sequence holds."""
        self._release(holder)
        if self.edges is not None:
            self.edges.release(holder.first_page, holder.ring)
        if self.states is not None:
            self.states.stop(holder)
        holder.first_page = holder.ring = -1
        holder.tables, holder.behind, holder.prefixes, holder.num_cached = [], [], [], 0

    def clear(self) -> None:
        """Forget every cached prefix, so that the next request is a cold one."""
        for pool in self.groups:
            pool.clear()
        if self.edges is not None:
            self.edges.firsts.clear()
        if self.states is not None:
            self.states.snapshots.clear()

    def check_held(self, holders: Sequence[Holding]) -> None:
        """Raise AssertionError unless all pools are whole and the references are exactly those of `holders`."""
        for i, pool in enumerate(self.groups):
            pool.check()
            held = Counter(block for holder in holders for block in holder.tables[i][holder.behind[i] :])
            there = {index: block.references for index, block in enumerate(pool.blocks) if block.references}
            assert held == there, f"references to blocks of group {i} are not those of who runs"
        if self.edges is not None:
            self.edges.check([(holder.first_page, holder.ring) for holder in holders])
        if self.states is not None:
            self.states.check(holders)

    def _take_over(self, holder: Holding, hit: Hit) -> None:
        holder.tables, holder.behind = hit.tables, self.behinds(len(hit))
        holder.prefixes, holder.num_cached = hit.prefixes, len(hit) * self.block_size

    def _release(self, holder: Holding) -> None:
        for pool, table, behind in zip(self.groups, holder.tables, holder.behind, strict=True):
            pool.release(table[behind:])

    def _findable(self, prefix: bytes) -> bool:
        """Whether the blocks of a prefix are cached, its states aside. A model without attention has one group of
        reach 1, which needs none."""
        return self.groups[0].reach == 1 or prefix in self.groups[0].by_prefix
