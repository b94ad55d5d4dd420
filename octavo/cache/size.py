"""What a cache takes, and how many blocks it gets: those asked for, or what sessions need within what memory allows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, own_span, reaches
from octavo.cache.snapshots import EACH
from octavo.cache.states import StatePlan
from octavo.devices import Device
from octavo.errors import OctavoError
from octavo.quant.format import KVFormat, by_layer
from octavo.units import format_bytes, parse_bytes

BLOCK_SIZE = Layout.block_size  # tokens, unless said otherwise
SPARE = 4  # beginnings of conversations that are kept beside the sequences that run: first pages, windows


@dataclass(frozen=True)
class GroupSize:
    """The layers of one reach: all tokens of a session, or those of a window."""

    reach: int | None  # tokens
    block: int  # bytes in all of the group's layers


@dataclass(frozen=True)
class CacheSize:
    """What a cache consists of, in bytes of all its layers. `KVCache.nbytes` is `cache(blocks, sessions)`, but for what
    a layout keeps after the last block (`SLACK`)."""

    block_size: int  # tokens
    groups: tuple[GroupSize, ...]  # the widest reach first
    raw_page: int  # bytes of `block_size` rows at an edge, in the model's own type; 0 without edges
    ring: int  # raw pages of a running session's own span; 0 without edges
    step: int = 0  # most tokens of a step, whose blocks are taken before those behind a window are free
    states: int = 0  # of a running session in the layers that keep states of fixed size
    snapshots: int | None = None  # of states, for prefixes; None: some for each session

    @classmethod
    def of(
        cls,
        shapes: Sequence[LayerShape],
        formats: KVFormat | Iterable[KVFormat],
        block_size: int = BLOCK_SIZE,
        step: int = 0,
        states: StatePlan | None = None,
        snapshots: int | None = None,
    ) -> CacheSize:
        """Of layers of these shapes; `formats` is one for each, or one for all. `states` are those of other layers."""
        each = by_layer(formats, len(shapes))
        pairs = list(zip(shapes, each, strict=True))
        token = {
            reach: sum(shape.token_bytes(format) for shape, format in pairs if shape.reach == reach)
            for reach in reaches(shapes)
        }
        return cls(
            block_size,
            tuple(GroupSize(reach, block_size * nbytes) for reach, nbytes in token.items()),
            block_size * sum(shape.raw_token_bytes(format) for shape, format in pairs),
            own_span(each, block_size) // block_size,
            step,
            states.nbytes if states else 0,
            snapshots if states else 0,
        )

    @property
    def block(self) -> int:
        """Bytes of a block in all groups."""
        return sum(group.block for group in self.groups)

    @property
    def token(self) -> int:
        """Bytes of one token's codes while every layer has them."""
        return self.block // self.block_size

    @property
    def spare(self) -> int:
        """Raw pages of a cache beside those of sessions: for the beginnings of conversations that wait for their next
        message."""
        return SPARE if self.ring else 0

    def blocks(self, tokens: int, group: int = 0) -> int:
        """That a session of so many tokens has in a group."""
        blocks, reach = -(-tokens // self.block_size), self.groups[group].reach
        return blocks if reach is None else min(blocks, self._window(reach))

    def pools(self, blocks: int, sessions: int) -> list[int]:
        """Blocks of each group of a cache that has `blocks` where nothing is freed: of a group with a window those of
        the running sessions' windows, of what a step computes, and of some windows that wait."""
        return [
            blocks if group.reach is None
            else min(blocks, sessions * self._window(group.reach)) + self._beside(group.reach)
            for group in self.groups
        ]  # fmt: skip

    def raw_pages(self, sessions: int) -> int:
        """Of a cache for `sessions` running sequences: a ring and a first page each, and the spare ones."""
        return sessions * (self.ring + 1) + self.spare if self.ring else 0

    @property
    def session_states(self) -> int:
        """Bytes of a session's states, and of the snapshots that come with it."""
        return self.states * (1 + self.snapshots_beside(1) - self.snapshots_beside(0))

    def snapshots_beside(self, sessions: int) -> int:
        """Snapshots of states of a cache for so many running sequences."""
        return EACH * sessions if self.snapshots is None else self.snapshots

    def of_blocks(self, counts: Sequence[int]) -> int:
        """Bytes of so many blocks of each group."""
        return sum(count * group.block for count, group in zip(counts, self.groups, strict=True))

    def session(self, tokens: int) -> int:
        """Bytes of a running session; its last block counts whole. Snapshots that come with each are counted."""
        blocks = [self.blocks(tokens, group) for group in range(len(self.groups))]
        return self.of_blocks(blocks) + self.raw_page * (self.raw_pages(1) - self.spare) + self.session_states

    def cache(self, blocks: int, sessions: int) -> int:
        """Bytes of a whole cache. Of states there is one slot of nobody (states.py)."""
        states = self.states * (sessions + self.snapshots_beside(sessions) + 1)
        return self.of_blocks(self.pools(blocks, sessions)) + self.raw_pages(sessions) * self.raw_page + states

    def blocks_within(self, memory: int, sessions: int) -> int:
        """Most blocks, where nothing is freed, of a cache for `sessions` sessions that takes no more than `memory`;
        below 0 if none does."""
        kept = sum(group.block for group in self.groups if group.reach is None)
        windows = max((sessions * self._window(group.reach) for group in self.groups if group.reach), default=0)
        most = memory // kept if kept else windows
        return bisect_right(range(most + 1), memory, key=lambda blocks: self.cache(blocks, sessions)) - 1

    def _window(self, reach: int) -> int:
        """Most blocks that the last `reach` tokens lie in, wherever a session ends."""
        return -(-(reach - 1) // self.block_size) + 1

    def _beside(self, reach: int) -> int:
        return SPARE * self._window(reach) - (-self.step // self.block_size)


def num_blocks(
    size: CacheSize,
    sessions: int,
    session_len: int,
    device: Device,
    free: int,
    memory: int | None = None,
    share: float | None = None,
) -> int:
    """Blocks of a cache for `sessions` sessions of `session_len` tokens, beside its raw pages.

    `memory` bytes are taken as asked for; else what the sessions need (all, where the memory is dedicated), within
    `share` of the bytes that are `free` on the device.
    """
    fixed = size.cache(0, sessions)
    if memory is not None:
        if share is not None:
            raise OctavoError("--kv-cache-memory and --cache-max-entry-count both size the KV cache; give one")
        if memory > free:
            raise OctavoError(f"a KV cache of {format_bytes(memory)} does not fit: {format_bytes(free)} are free")
        blocks = size.blocks_within(memory, sessions)
        if blocks < 1:
            more = f", and what {sessions} sessions have beside blocks {format_bytes(fixed)}" if fixed else ""
            cache = f"a KV cache of {format_bytes(memory)} holds not one block"
            raise OctavoError(f"{cache}; a block takes {format_bytes(size.block)}{more}")
        return blocks
    share = device.cache_share if share is None else share
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise OctavoError(f"--cache-max-entry-count is a share of the free memory between 0 and 1, not {share!r}")
    fits = size.blocks_within(int(free * share), sessions)
    if fits < 1:
        needed = format_bytes(size.cache(1, sessions))
        raise OctavoError(f"only {format_bytes(free)} are free: too little for a cache of one block, {needed}")
    return fits if device.dedicated else min(sessions * -(-session_len // size.block_size), fits)


def num_snapshots(states: StatePlan, memory: str | int | None) -> int | None:
    """Snapshots of states of a cache that has so many bytes for them; None: those that come with each session."""
    if memory is None:
        return None
    if not states:
        raise OctavoError("this model keeps no states, of which snapshots could be taken: leave --snapshot-memory out")
    return parse_bytes(memory) // states.nbytes
