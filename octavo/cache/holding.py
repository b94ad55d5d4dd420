"""What a sequence holds of a cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.cache.snapshots import Trail


@dataclass(eq=False, kw_only=True)
class Held:
    """Where the rows and states of a sequence lie. `tables` may be one that all groups have."""

    tokens: Sequence[int] = field(default_factory=list)
    num_cached: int = 0  # tokens whose K and V are in the cache
    tables: list[list[int]] = field(default_factory=list)  # of each group of layers: the blocks of its tokens
    behind: list[int] = field(default_factory=list)  # of each group: leading blocks that no query sees, given back
    first_page: int = -1  # the raw page of page 0, where the format has edges
    ring: int = -1  # the first of the raw pages of its own span
    state_slot: int | None = None  # of its states, where the model has layers that keep some


@dataclass(eq=False, kw_only=True)
class Holding(Held):
    """A sequence, as far as the cache knows it: what it holds while it runs, and what others find it by."""

    tokens: list[int]
    lacks_first: bool = False  # whether it computes a first page, to go on from what is cached behind it
    prefixes: list[bytes] = field(default_factory=list)  # hash of the prefix that each full block ends
    trail: Trail | None = None  # its snapshots of states, until it ends
