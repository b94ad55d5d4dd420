"""What one step reads and writes: plain tensors, built once per step on the host, read by every layer.

A step is a list of `(sequence, n_new)`: each sequence computes its next n_new tokens. Decode is n_new = 1, a chunk of a
prompt is more, and both share a step. Nothing below this file knows about phases, nothing above it about slots.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from octavo.cache.holding import Held
from octavo.devices import HOST, send


@dataclass
class Batch:
    """T packed rows of B sequences, in order. Index tensors are int64.

    Lengths are there twice: tensors for kernels, lists for what the host decides (shapes of temporaries, grids). One in
    `fixed` buffers (engine/graphs.py) stands for any step of its size: its `kv_lens` are upper bounds, `kv_len` is
    right, and who runs it counts what is written.
    """

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    # Of group 0:
    slots: Tensor  # [T] where each row's K and V go: block·block_size + place, or −1: nowhere
    block_table: Tensor  # [B, most blocks]; beyond a sequence's own, and behind a window, any block, never visible
    q_start: Tensor  # [B + 1] each sequence's first row, and T
    kv_len: Tensor  # [B] tokens each sequence can see once the new ones are written; 0 for a padded row
    q_lens: list[int]  # new tokens of each sequence
    kv_lens: list[int]
    logits_at: Tensor  # [sequences whose next token is due] rows of their last tokens
    # Where the format has edges:
    raw_slots: Tensor | None = None  # [T] raw page·block_size + place; −1: the row is at no edge once the step is done
    first: Tensor | None = None  # [B] raw page of page 0
    ring: Tensor | None = None  # [B] first of span/block_size raw pages in a row: row t beyond page 0 is at t mod span
    state_slots: Tensor | None = None  # [B] where layers keep states: each sequence's slot
    fixed: bool = False
    plan: dict[Any, Any] = field(default_factory=dict)  # what an attention implementation keeps for a group's layers
    others: list[Batch] = field(default_factory=list)  # the step as the other groups have it: their slots and tables

    @classmethod
    def build(
        cls,
        work: Sequence[tuple[Held, int]],
        block_size: int,
        newest: Tensor | None = None,
        span: int = 0,
        states: bool = False,
    ) -> Batch:
        """The step in which each sequence computes its next n tokens. `span` is that of the cache's edges; `states`
        says whether the cache has some.

        With `newest` [B] each computes a token that the step before has sampled and the host does not know yet: the one
        after all of the sequence's own.
        """
        q_lens = [n for _, n in work]
        if newest is None and max(q_lens) == 1:
            return cls._of_tokens([sequence for sequence, _ in work], block_size, span, states)
        if newest is None:
            kv_lens = [sequence.num_cached + n for sequence, n in work]
            ids = torch.tensor([token for (sequence, _), n, end in zip(work, q_lens, kv_lens, strict=True)
                                for token in sequence.tokens[end - n : end]])  # fmt: skip
        else:
            kv_lens = [len(sequence.tokens) + 1 for sequence, _ in work]
            ids = newest
        lens, kv_len = torch.tensor(q_lens), torch.tensor(kv_lens)
        ends = lens.cumsum(0)
        row = torch.repeat_interleave(lens)  # which sequence each row is of
        positions = torch.arange(len(row)) + (kv_len - ends)[row]
        slots, table = [], []
        for group in range(len(work[0][0].tables)):
            table.append(_table([sequence.tables[group] for sequence, _ in work]))
            slots.append(table[-1][row, positions // block_size] * block_size + positions % block_size)
        due = [end >= len(sequence.tokens) for (sequence, _), end in zip(work, kv_lens, strict=True)]
        q_start = torch.cat([ends.new_zeros(1), ends])
        logits_at = ends[torch.tensor(due)] - 1
        batch = cls(ids, positions, slots[0], table[0], q_start, kv_len, q_lens, kv_lens, logits_at)
        if states:
            batch.state_slots = torch.tensor([sequence.state_slot for sequence, _ in work])
        if span:
            batch.first = torch.tensor([sequence.first_page for sequence, _ in work])
            batch.ring = torch.tensor([sequence.ring for sequence, _ in work])
            begins = (kv_len - 1) // span * span  # of the last new row: earlier rows of the ring are never read again
            at_ring = batch.ring[row] * block_size + positions % span
            at_edge = torch.where(positions >= begins[row], at_ring, -1)
            batch.raw_slots = torch.where(positions < block_size, batch.first[row] * block_size + positions, at_edge)
        return batch.beside(slots[1:], table[1:])

    @classmethod
    def _of_tokens(cls, sequences: Sequence[Held], block_size: int, span: int, states: bool) -> Batch:
        """A step of one token for each sequence: its numbers are few, and become one tensor."""
        count, at = len(sequences), [sequence.num_cached for sequence in sequences]
        groups = range(len(sequences[0].tables))
        numbers: dict[str, list[Any]] = {
            "ids": [sequence.tokens[i] for sequence, i in zip(sequences, at, strict=True)],
            "positions": at,
            "kv_len": [i + 1 for i in at],
            "q_start": list(range(count + 1)),
            "logits_at": [
                row for row, sequence in enumerate(sequences) if sequence.num_cached + 1 >= len(sequence.tokens)
            ],
        }
        for group in groups:
            places = (divmod(i, block_size) for i in at)
            numbers[f"slots {group}"] = [
                sequence.tables[group][block] * block_size + place
                for sequence, (block, place) in zip(sequences, places, strict=True)
            ]
        if states:
            numbers["state_slots"] = [sequence.state_slot for sequence in sequences]
        if span:
            numbers["first"] = [sequence.first_page for sequence in sequences]
            numbers["ring"] = [sequence.ring for sequence in sequences]
            numbers["raw_slots"] = [
                (first * block_size + i) if i < block_size else ring * block_size + i % span
                for i, first, ring in zip(at, numbers["first"], numbers["ring"], strict=True)
            ]
        flat = torch.frombuffer(array("q", chain.from_iterable(numbers.values())), dtype=torch.int64)
        tensors = dict(zip(numbers, flat.split([len(column) for column in numbers.values()]), strict=True))
        slots = [tensors.pop(f"slots {group}") for group in groups]
        tables = [_table([sequence.tables[group] for sequence in sequences]) for group in groups]
        batch = cls(
            **tensors,
            slots=slots[0],
            block_table=tables[0],
            q_lens=[1] * count,
            kv_lens=numbers["kv_len"],
        )
        return batch.beside(slots[1:], tables[1:])

    def beside(self, slots: Sequence[Tensor], tables: Sequence[Tensor]) -> Batch:
        """This step, with what the other groups have in the place of group 0's slots and tables."""
        self.others = [replace(self, slots=own, block_table=table, plan={}, others=[])
                       for own, table in zip(slots, tables, strict=True)]  # fmt: skip
        return self

    @property
    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """`raw_slots`, `first` and `ring`, where the format has edges."""
        assert self.raw_slots is not None, "the batch was built without the span of the cache"
        assert self.first is not None
        assert self.ring is not None
        return self.raw_slots, self.first, self.ring

    def of(self, group: int) -> Batch:
        """The step as the layers of a group have it. Where it was built of one table, all groups have that."""
        return self.others[group - 1] if group and self.others else self

    def on(self, device: torch.device) -> Batch:
        """This batch with its tensors on `device`: itself, or one copy shared by that device's layers."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor) and x.device != device}
        if not tensors:
            return self
        if device not in self.plan:
            moved = replace(self, **_moved(tensors, device), plan={})
            others = [_moved({"slots": own.slots, "block_table": own.block_table}, device) for own in self.others]
            self.plan[device] = moved.beside([own["slots"] for own in others], [own["block_table"] for own in others])
        return self.plan[device]


def _table(blocks: list[list[int]]) -> Tensor:
    """Tables of different lengths as one tensor, [tables, longest]."""
    widest = max(map(len, blocks))
    flat = array("q")  # from a list of lists torch takes twenty times as long
    for own in blocks:
        flat.extend(own + own[-1:] * (widest - len(own)))
    return torch.frombuffer(flat, dtype=torch.int64).view(len(blocks), widest)


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Index tensors on `device`, those of the host in one copy."""
    host = {name: x for name, x in tensors.items() if x.device == HOST}
    packed = torch.cat([x.flatten() for x in host.values()]) if host else torch.empty(0, dtype=torch.int64)
    parts = send(packed, device).split([x.numel() for x in host.values()])
    moved = {name: part.view(host[name].shape) for name, part in zip(host, parts, strict=True)}
    return {name: moved[name] if name in moved else x.to(device) for name, x in tensors.items()}
