"""The block pool: by hand, and against a slow model of it under random operations."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.cache import blocks as of_blocks
from octavo.cache import pool as of_pools
from octavo.cache.blocks import BlockPool, prefix_hash
from octavo.cache.pool import CachePool

SIZE = 4


def fill(pool: BlockPool, tokens: Tokens[int]) -> list[int]:
    """The block table of a sequence that computed all of `tokens`: shared blocks, then its own, full ones sealed."""
    found = CachePool([pool]).match(tokens)
    table = list(found.tables[0])
    parent = found.prefixes[-1] if found else None
    while len(table) < pool.blocks_for(len(tokens)):
        table.append(pool.take())
        own = tokens[(len(table) - 1) * pool.block_size : len(table) * pool.block_size]
        if len(own) == pool.block_size:
            parent = pool.seal(table[-1], parent, own)
    pool.check()
    return table


def matched(pool: BlockPool, tokens: Tokens[int]) -> list[int]:
    """The blocks that a prompt would hit, without keeping them."""
    table = CachePool([pool]).match(tokens).tables[0]
    pool.check()
    pool.release(table)
    pool.check()
    return table


def count(stop: int) -> list[int]:
    return list(range(stop))


def test_a_new_pool_is_free_and_consistent() -> None:
    pool = BlockPool(5, SIZE)
    pool.check()
    assert len(pool) == len(pool.free) == 5
    assert not pool.by_prefix


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_tokens_need_whole_blocks(tokens: int, blocks: int) -> None:
    assert BlockPool(1, 64).blocks_for(tokens) == blocks


def test_taken_blocks_are_distinct_and_leave_the_free_list() -> None:
    pool = BlockPool(4, SIZE)
    taken = [pool.take() for _ in range(4)]
    assert sorted(taken) == [0, 1, 2, 3]
    assert not pool.free
    pool.check()


def test_kept_blocks_are_reused_in_the_order_in_which_they_were_freed() -> None:
    pool = BlockPool(4, SIZE)
    tables = [fill(pool, [token] * SIZE) for token in range(4)]
    for which in (2, 0, 3, 1):
        pool.release(tables[which])
    assert [pool.take() for _ in range(4)] == [tables[which][0] for which in (2, 0, 3, 1)]


def test_blocks_that_nobody_can_find_come_first_then_those_that_were_never_used() -> None:
    """So a cache takes no more memory than it needs."""
    pool = BlockPool(4, SIZE)
    kept, unfinished = fill(pool, count(SIZE + 1))
    pool.release([kept, unfinished])
    assert [pool.take() for _ in range(4)] == [unfinished, 2, 3, kept]


def test_a_table_is_freed_from_its_tail() -> None:
    pool = BlockPool(3, SIZE)
    table = fill(pool, count(12))
    pool.release(table)
    assert [pool.take() for _ in range(3)] == table[::-1]


def test_the_beginning_of_a_prefix_outlives_its_end() -> None:
    pool = BlockPool(4, SIZE)
    table = fill(pool, count(16))
    pool.release(table)
    for kept in (3, 2, 1, 0):
        pool.take()
        assert matched(pool, count(17)) == table[:kept]


def test_a_freed_prefix_is_found_again() -> None:
    pool = BlockPool(8, SIZE)
    table = fill(pool, count(10))
    pool.release(table)
    assert len(pool.free) == 8
    found = CachePool([pool]).match(count(10))
    assert found.tables == [table[:2]]
    assert not set(table[:2]) & set(pool.free)
    pool.check()


def test_a_hit_comes_with_the_hashes_of_its_prefixes() -> None:
    pool = BlockPool(4, SIZE)
    fill(pool, count(8))
    first = prefix_hash(None, count(4))
    assert CachePool([pool]).match(count(9)).prefixes == [first, prefix_hash(first, [4, 5, 6, 7])]


@pytest.mark.parametrize(
    ("length", "blocks"), [(0, 0), (1, 0), (3, 0), (4, 0), (5, 1), (7, 1), (8, 1), (9, 2), (12, 2), (13, 3), (50, 3)]
)
def test_a_hit_is_whole_blocks_and_never_covers_the_last_token(length: int, blocks: int) -> None:
    pool = BlockPool(20, SIZE)
    table = fill(pool, count(12))
    assert matched(pool, count(length)) == table[:blocks]


def test_a_hit_ends_at_the_first_token_that_differs() -> None:
    pool = BlockPool(20, SIZE)
    table = fill(pool, count(16))
    for changed, blocks in [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (15, 3), (16, 4)]:
        tokens = count(17)
        tokens[changed] = 99
        assert matched(pool, tokens) == table[:blocks]


def test_the_same_tokens_after_another_beginning_are_another_prefix() -> None:
    pool = BlockPool(20, SIZE)
    fill(pool, [1, 1, 1, 1, 5, 6, 7, 8])
    assert matched(pool, [5, 6, 7, 8, 0]) == []
    own = fill(pool, [2, 2, 2, 2, 5, 6, 7, 8, 0])
    assert matched(pool, [2, 2, 2, 2, 5, 6, 7, 8, 0]) == own[:2]


def test_a_block_that_is_not_full_is_not_found() -> None:
    pool = BlockPool(4, SIZE)
    table = fill(pool, count(7))
    assert matched(pool, count(20)) == table[:1]


def test_a_shared_block_is_free_only_when_its_last_owner_lets_go() -> None:
    pool = BlockPool(8, SIZE)
    first = fill(pool, count(9))
    second = fill(pool, count(9))
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert [pool.blocks[index].references for index in first] == [2, 2, 1]
    pool.release(first)
    pool.check()
    assert set(pool.free) >= {first[2]}
    assert not set(second) & set(pool.free)
    pool.release(second)
    pool.check()
    assert len(pool.free) == 8


def test_matching_a_freed_block_protects_it_from_being_taken() -> None:
    pool = BlockPool(3, SIZE)
    table = fill(pool, count(12))
    pool.release(table)
    held = CachePool([pool]).match(count(9)).tables[0]
    assert held == table[:2]
    assert pool.take() == table[2]
    assert not pool.free


def test_a_block_that_is_taken_forgets_what_it_held() -> None:
    pool = BlockPool(1, SIZE)
    fill(pool, count(4))
    pool.release([0])
    assert matched(pool, count(5)) == [0]
    assert pool.take() == 0
    pool.check()
    assert pool.blocks[0].prefix is None
    assert pool.blocks[0].tokens == ()
    assert matched(pool, count(5)) == []


def test_a_duplicate_stays_in_its_table_and_the_first_stays_the_shared_one() -> None:
    pool = BlockPool(8, SIZE)
    a, b = pool.take(), pool.take()  # two sequences compute the same prompt in the same step
    assert pool.seal(a, None, count(4)) == pool.seal(b, None, count(4)) == prefix_hash(None, count(4))
    pool.check()
    assert matched(pool, count(5)) == [a]
    pool.release([b])
    pool.check()
    assert matched(pool, count(5)) == [a]
    pool.release([a])
    assert matched(pool, count(5)) == [a]


def test_after_the_shared_one_is_gone_a_prefix_can_be_sealed_anew() -> None:
    pool = BlockPool(2, SIZE)
    pool.release(fill(pool, count(4)))
    table = [pool.take(), pool.take()]
    assert matched(pool, count(5)) == []
    pool.seal(table[1], None, count(4))
    assert matched(pool, count(5)) == [table[1]]


def test_a_hit_has_no_holes() -> None:
    """A later block can outlive an earlier one, where two sequences computed the same beginning at the same time."""
    pool = BlockPool(3, SIZE)
    a, b = pool.take(), pool.take()
    parent = pool.seal(a, None, count(4))
    assert pool.seal(b, None, count(4)) == parent  # a duplicate: a is the shared one
    pool.seal(pool.take(), parent, [4, 5, 6, 7])  # follows b
    assert len(matched(pool, count(9))) == 2
    pool.release([a])
    assert pool.take() == a
    assert matched(pool, count(9)) == []


def test_a_hash_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BlockPool(8, SIZE)
    for module in (of_blocks, of_pools):
        monkeypatch.setattr(module, "prefix_hash", lambda _parent, _tokens: b"the same")
    one, other = pool.take(), pool.take()
    pool.seal(one, None, [1, 2, 3, 4])
    pool.seal(other, None, [5, 6, 7, 8])
    pool.check()
    assert matched(pool, [5, 6, 7, 8, 9]) == []
    assert matched(pool, [1, 2, 3, 4, 9]) == [one]
    pool.release([one])
    pool.release([other])
    pool.check()


def test_clear_forgets_every_prefix_and_moves_no_block() -> None:
    pool = BlockPool(8, SIZE)
    kept = fill(pool, count(8))
    pool.release(fill(pool, [9, 9, 9, 9, 9, 9, 9, 9]))
    free = list(pool.free)
    pool.clear()
    pool.check()
    assert list(pool.free) == free
    assert [pool.blocks[index].references for index in kept] == [1, 1]
    assert matched(pool, count(9)) == matched(pool, [9] * 9) == []
    again = fill(pool, count(8))
    assert not set(again) & set(kept)
    assert matched(pool, count(9)) == again


def test_without_prefix_caching_nothing_is_remembered() -> None:
    pool = BlockPool(8, SIZE, prefix_caching=False)
    table = fill(pool, count(9))
    assert not pool.by_prefix
    assert len(CachePool([pool]).match(count(9))) == 0
    assert not set(fill(pool, count(5))) & set(table)
    pool.release(table)
    pool.clear()
    pool.check()
    assert matched(pool, count(9)) == []


def test_a_prefix_hash_depends_on_every_token_and_their_order() -> None:
    texts: list[list[int]] = [[], [0], [1], [0, 0], [0, 1], [1, 0], [256], [65536], [2**32 - 1]]
    hashes = [prefix_hash(parent, text) for text in texts for parent in (None, prefix_hash(None, [7]))]
    assert len(set(hashes)) == len(hashes)
    assert all(len(digest) == 16 for digest in hashes)
    assert prefix_hash(None, [1, 2]) == prefix_hash(None, (1, 2))


def lost() -> BlockPool:
    pool = BlockPool(4, 2)
    pool.free.popitem()
    return pool


def free_and_referenced() -> BlockPool:
    pool = BlockPool(4, 2)
    pool.blocks[0].references = 1
    return pool


def released_twice() -> BlockPool:
    pool = BlockPool(4, 2)
    table = fill(pool, [1, 2])
    pool.release(table)
    pool.release(table)
    return pool


def hash_that_leads_nowhere() -> BlockPool:
    pool = BlockPool(4, 2)
    fill(pool, [1, 2, 3, 4])
    pool.by_prefix.clear()
    return pool


def hash_of_a_block_that_forgot_it() -> BlockPool:
    pool = BlockPool(4, 2)
    pool.blocks[fill(pool, [1, 2, 3, 4])[0]].prefix = None
    return pool


@pytest.mark.parametrize(
    "broken", [lost, free_and_referenced, released_twice, hash_that_leads_nowhere, hash_of_a_block_that_forgot_it]
)
def test_check_notices_what_must_not_be(broken: Callable[[], BlockPool]) -> None:
    with pytest.raises(AssertionError):
        broken().check()


@dataclass
class Running:
    """A sequence of the model: its tokens, and the block table it was given."""

    tokens: list[int]
    table: list[int] = field(default_factory=list)
    parent: bytes | None = None


class PoolMachine(RuleBasedStateMachine):
    """Sequences start, grow and end in any order; a model of plain lists says which block each step must give.

    Two tokens and blocks of two make prefixes collide, hit and be evicted all the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7, 2)
        self.free = list(range(7))  # oldest first
        self.shared: dict[tuple[int, ...], int] = {}  # a whole prefix → the block that ends it
        self.running: list[Running] = []

    def take(self, sequence: Running) -> None:
        expected = self.free.pop(0)
        self.shared = {prefix: block for prefix, block in self.shared.items() if block != expected}
        assert self.pool.take() == expected
        sequence.table.append(expected)

    def grow(self, sequence: Running, token: int) -> None:
        if len(sequence.tokens) == 2 * len(sequence.table):
            self.take(sequence)
        sequence.tokens.append(token)
        if len(sequence.tokens) == 2 * len(sequence.table):
            sequence.parent = self.pool.seal(sequence.table[-1], sequence.parent, sequence.tokens[-2:])
            self.shared.setdefault(tuple(sequence.tokens), sequence.table[-1])

    def fits(self, sequence: Running) -> bool:
        return bool(self.free) or len(sequence.tokens) < 2 * len(sequence.table)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), computed=st.integers(0, 9))
    def start(self, tokens: list[int], computed: int) -> None:
        expected = []
        for end in range(2, len(tokens), 2):  # never the last token
            if tuple(tokens[:end]) not in self.shared:
                break
            expected.append(self.shared[tuple(tokens[:end])])
        found = CachePool([self.pool]).match(tokens)
        assert found.tables == [expected]
        self.free = [block for block in self.free if block not in expected]
        sequence = Running(tokens[: 2 * len(expected)], expected, found.prefixes[-1] if found else None)
        self.running.append(sequence)
        for token in tokens[len(sequence.tokens) :][:computed]:
            if self.fits(sequence):
                self.grow(sequence, token)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1))
    def decode(self, which: int, token: int) -> None:
        sequence = self.running[which % len(self.running)]
        if self.fits(sequence):
            self.grow(sequence, token)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        sequence = self.running.pop(which % len(self.running))
        self.pool.release(sequence.table)
        held = {block for other in self.running for block in other.table}
        for block in reversed(sequence.table):
            if block not in held:
                self.free.insert(len(self.free) if block in self.shared.values() else 0, block)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.shared = {}

    @invariant()
    def pool_is_as_the_model_says(self) -> None:
        self.pool.check()
        assert list(self.pool.free) == self.free
        tables = [block for sequence in self.running for block in sequence.table]
        assert [block.references for block in self.pool.blocks] == [tables.count(i) for i in range(7)]
        assert sorted(self.pool.by_prefix.values()) == sorted(self.shared.values())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
