"""Which block of the cache belongs to whom. Pure Python: numbers only, no tensors.

A block holds the K and V of `block_size` consecutive tokens, in every layer. A full block is remembered by the hash of
its whole prefix, so that a later sequence with the same beginning shares it instead of computing it. A freed block
keeps its contents and its hash until it is taken for something else: first those that nobody can find, so that memory
is touched only where it is needed, then those that were never used, then the least recently freed; sequences free their
blocks from the tail, so the beginning of a prefix outlives its end.

    free ∪ referenced = all blocks, disjoint        a block table is append-only: a block never moves
"""

from collections import OrderedDict
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b
from struct import pack

GONE = 0  # in a table: a block that nobody sees. Kernels may look it up, so it is a block that there is


@dataclass(slots=True)
class Block:
    references: int = 0
    prefix: bytes | None = None  # hash of all tokens up to this block's end; None while it is not full
    tokens: tuple[int, ...] = ()  # its own tokens, to verify a hit


def prefix_hash(parent: bytes | None, tokens: Tokens[int]) -> bytes:
    """Hash of a prefix that ends with the block `tokens`, given the hash of what stands before it."""
    return blake2b((parent or b"") + pack(f"<{len(tokens)}I", *tokens), digest_size=16).digest()


class BlockPool:
    """Hands out, shares and takes back `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True, reach: int | None = None):
        self.block_size = block_size
        self.reach = reach  # no query sees more than this many last tokens, its own included; None: all
        self.prefix_caching = prefix_caching
        self.blocks = [Block() for _ in range(num_blocks)]
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # oldest first
        self.by_prefix: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def used(self) -> int:
        """Blocks that running sequences hold; one that several share counts once."""
        return len(self.blocks) - len(self.free)

    @property
    def kept(self) -> int:
        """Free blocks that a later sequence can still find."""
        return sum(self.blocks[index].prefix is not None for index in self.free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def behind(self, tokens: int) -> int:
        """Leading blocks that no query sees any more once so many tokens are stored."""
        return 0 if self.reach is None else max(0, tokens - self.reach + 1) // self.block_size

    def let_go(self, table: list[int], behind: int, tokens: int) -> int:
        """Give back those blocks of a table that no query sees once so many tokens are stored; where it ends before
        them, it goes on without blocks. The first `behind` were given back before; returns how many now are."""
        after = max(behind, self.behind(tokens))
        self.release(table[behind:after])
        table[behind:after] = [GONE] * (after - behind)
        return after

    def take(self) -> int:
        """A block of one's own; what it held is forgotten. The caller has looked at `len(pool.free)`."""
        index, _ = self.free.popitem(last=False)
        block = self.blocks[index]
        self._forget(index)
        block.references = 1
        return index

    def share(self, table: Tokens[int]) -> None:
        """Add a reference to each block of a table."""
        for index in table:
            self.blocks[index].references += 1
            self.free.pop(index, None)

    def grow(self, count: int) -> None:
        """Have `count` more blocks, all free."""
        self.free.update(dict.fromkeys(range(len(self.blocks), len(self.blocks) + count)))
        self.blocks += [Block() for _ in range(count)]

    def lookup(self, prefix: bytes, own: tuple[int, ...]) -> int | None:
        """The block that ends that prefix with the tokens `own`."""
        index = self.by_prefix.get(prefix)
        return index if index is not None and self.blocks[index].tokens == own else None

    def seal(self, index: int, parent: bytes | None, tokens: Tokens[int]) -> bytes:
        """Remember a block that has become full of `tokens`; returns the hash of the prefix it ends.

        If another block holds the same prefix already, that one stays the shared one: tables do not change.
        """
        own = tuple(tokens)
        prefix = prefix_hash(parent, own)
        if self.prefix_caching and prefix not in self.by_prefix:
            self.by_prefix[prefix] = index
            self.blocks[index].prefix, self.blocks[index].tokens = prefix, own
        return prefix

    def release(self, table: Tokens[int]) -> None:
        """Give back the references of a block table, tail first."""
        for index in reversed(table):
            block = self.blocks[index]
            block.references -= 1
            if block.references == 0:
                self.free[index] = None
                if block.prefix is None:
                    self.free.move_to_end(index, last=False)

    def clear(self) -> None:
        """Forget every cached prefix, so that the next request is a cold one."""
        for index in list(self.by_prefix.values()):
            self._forget(index)

    def check(self) -> None:
        """Raise AssertionError unless every block is either free or referenced and every hash leads to its block."""
        for index, block in enumerate(self.blocks):
            assert (block.references == 0) == (index in self.free), f"block {index}: {block.references} references"
            assert block.prefix is None or self.by_prefix.get(block.prefix) == index, f"block {index}: stale hash"
        assert all(self.blocks[index].prefix == prefix for prefix, index in self.by_prefix.items())

    def _forget(self, index: int) -> None:
        block = self.blocks[index]
        if block.prefix is not None:
            del self.by_prefix[block.prefix]
        block.prefix, block.tokens = None, ()
