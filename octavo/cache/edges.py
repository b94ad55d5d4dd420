"""Raw pages: where a format has edges, queries read the rows of page 0 and of their own span raw, and the codes of all
pages between.

A raw page is as large as a block. A running sequence has

    first   page 0, shared with every sequence of the same first block; one that is gone is computed before a hit
    ring    span/block_size pages in a row: row t beyond page 0 lies at t mod span, until the next span overwrites it

so a hit is cut to whole spans, and a sequence that stops running gives both back. Pure Python, no tensors.
"""

from collections.abc import Sequence as Tokens

from octavo.cache.blocks import BlockPool, prefix_hash


class EdgePool:
    """The raw pages of a cache: `sessions` rings, and first pages of what is left of `pages`."""

    def __init__(self, span: int, block_size: int, pages: int, sessions: int, prefix_caching: bool = True):
        self.block_size, self.ring_pages = block_size, span // block_size
        self.rings = BlockPool(sessions, span, prefix_caching=False)
        self.firsts = BlockPool(max(0, pages - sessions * self.ring_pages), block_size, prefix_caching)
        if len(self.firsts) < sessions:
            raise ValueError(f"{pages} raw pages are too few for {sessions} sequences")

    @property
    def used(self) -> int:
        """Raw pages that running sequences hold; one that several share counts once."""
        return self.rings.used * self.ring_pages + self.firsts.used

    def find(self, tokens: Tokens[int]) -> int | None:
        """The cached first page of `tokens`."""
        own = tuple(tokens[: self.block_size])
        found = self.firsts.lookup(prefix_hash(None, own), own) if len(tokens) > self.block_size else None
        return None if found is None else self._page(found)

    def take(self, tokens: Tokens[int], hit: bool) -> tuple[int, int]:
        """First page and ring for a sequence that starts: with a hit the cached first page, else one of its own. There
        is one for each of `sessions` sequences."""
        first = self.find(tokens) if hit else None
        if first is None:
            first = self.take_first()
        else:
            self.firsts.share([self._index(first)])
        return first, self.rings.take() * self.ring_pages

    def take_first(self) -> int:
        """A first page of one's own; what it held is forgotten. The caller has looked at `firsts.free`."""
        return self._page(self.firsts.take())

    def seal(self, first: int, tokens: Tokens[int]) -> None:
        """Remember a first page that has become full of `tokens`."""
        self.firsts.seal(self._index(first), None, tokens)

    def release(self, first: int, ring: int | None) -> None:
        """Give back what `take` gave, or `take_first`."""
        self.firsts.release([self._index(first)])
        if ring is not None:
            self.rings.release([ring // self.ring_pages])

    def check(self, held: Tokens[tuple[int, int]]) -> None:
        """Raise AssertionError unless the pools are whole and `held`, the first pages and rings of those who run, are
        all that is referenced."""
        for pool in (self.firsts, self.rings):
            pool.check()
            assert sum(block.references for block in pool.blocks) == len(held), "a raw page leaked"
        assert all(self.firsts.blocks[self._index(first)].references for first, _ in held), "a first page was lost"
        assert len({ring for _, ring in held}) == len(held), "two sequences share a ring"

    def _page(self, first: int) -> int:
        return len(self.rings) * self.ring_pages + first

    def _index(self, page: int) -> int:
        return page - len(self.rings) * self.ring_pages
