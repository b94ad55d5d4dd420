"""States of fixed size: what layers that are recurrent, or convolve, keep of a sequence beside rows of K and V.

A running sequence holds one slot, which stands for its states in all such layers. They lie in memory that never moves:
of each device and type one tensor, in which a slot is a row and every layer has columns of its own. So to clear, copy
or save a slot is one operation. One slot more than there are sequences has no owner: rows that nobody asked for (those
that pad a captured step) read and write it, as slot −1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["conv", "recurrent"]
Name = tuple[Kind, int]
ALIGNED = 64  # bytes at which every state begins


@dataclass(frozen=True)
class StateShape:
    """One state of one layer and one sequence."""

    kind: Kind
    index: int  # a layer may have several of a kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> Name:
        return self.kind, self.index

    @property
    def columns(self) -> int:
        """Elements that it takes of a slot, padding included."""
        size = self.dtype.itemsize
        return -(-prod(self.shape) * size // ALIGNED) * ALIGNED // size

    @property
    def nbytes(self) -> int:
        return self.columns * self.dtype.itemsize


@dataclass(frozen=True)
class StatePlan:
    """The states of all layers that keep some, as a dry run of the model shows them."""

    layers: tuple[tuple[StateShape, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.layers)

    def of(self, dtype: torch.dtype) -> StatePlan:
        """The same of a model in another 16-bit type, or in float32: what is always float32 stays so."""
        layers = (
            tuple(s if s.dtype == torch.float32 else replace(s, dtype=dtype) for s in layer) for layer in self.layers
        )
        return StatePlan(tuple(layers))

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence's slot."""
        return sum(state.nbytes for layer in self.layers for state in layer)


class StatePool:
    """The states of `slots` sequences, by number, those of `snapshots` after them, and one slot of nobody."""

    def __init__(self, plan: StatePlan, slots: int, snapshots: int = 0):
        self.plan, self.slots, self.snapshots = plan, slots, snapshots
        self.unused = list(reversed(range(slots)))
        width: dict[tuple[torch.device, torch.dtype], int] = {}
        places: list[list[tuple[StateShape, tuple[torch.device, torch.dtype], int]]] = []  # memory, first column
        for layer in plan.layers:
            places.append([])
            for state in layer:
                key = state.device, state.dtype
                places[-1].append((state, key, width.get(key, 0)))
                width[key] = width.get(key, 0) + state.columns
        with torch.inference_mode(False):  # a later step may be outside of it
            self.memory = {
                (device, dtype): torch.zeros(slots + snapshots + 1, columns, dtype=dtype, device=device)
                for (device, dtype), columns in width.items()
            }
            self.layers: list[dict[Name, Tensor]] = [
                {
                    state.name: self.memory[key][:, first : first + prod(state.shape)].unflatten(1, state.shape)
                    for state, key, first in layer
                }
                for layer in places
            ]  # of each layer [slots + snapshots + 1, …], views of the memory

    def take(self) -> int:
        """A slot of one's own, of states that are zero: a sequence's before its first token."""
        slot = self.unused.pop()
        self.clear(slot)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back."""
        assert slot not in self.unused, f"slot {slot} is given back twice"
        self.unused.append(slot)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        for memory in self.memory.values():
            memory[slot].zero_()

    @torch.no_grad()
    def copy(self, source: int, to: int) -> None:
        """Have in slot `to` what slot `source` holds."""
        for memory in self.memory.values():
            memory[to].copy_(memory[source])

    def of(self, slot: int) -> dict[str, Tensor]:
        """The states of a slot, views by the names that files have them under: states.{layer}.{kind}.{index}."""
        return {
            f"states.{i}.{kind}.{index}": memory[slot]
            for i, layer in enumerate(self.layers)
            for (kind, index), memory in layer.items()
        }

    @property
    def used(self) -> int:
        return self.slots - len(self.unused)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, read from the tensors."""
        return sum(memory.nbytes for memory in self.memory.values())

    def check(self, held: Sequence[int]) -> None:
        """Raise AssertionError unless `held`, the slots of those who run, are all that is taken."""
        assert len(set(held)) == len(held), "two sequences share a slot of states"
        assert sorted([*held, *self.unused]) == list(range(self.slots)), "a slot of states leaked"
