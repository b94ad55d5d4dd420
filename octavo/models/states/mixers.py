"""A mixer in a packed step.

It gets, in place of all rows, those of one sequence at a time, and the one-token rows of all sequences as one batch;
each time with a cache that holds the states of these sequences alone, taken from their slots and put back. Without a
step (`stepping`) a mixer is as transformers made it: its rows are one sequence from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cache.batch import Batch
from octavo.cache.states import Name, StatePlan, StatePool, StateShape
from octavo.cache.store import KVCache
from octavo.contexts import during
from octavo.models.states.native import reading
from octavo.recurrences.cpu import Places

MIXER = "octavo_mixer"  # where a module keeps its Mixer


@dataclass(frozen=True)
class MixerCall:
    """Rows that a mixer computes in one call, of as many sequences as there are slots."""

    rows: slice | Tensor
    slots: Tensor  # [sequences]
    sequences: int
    tokens: int  # of each


@dataclass(eq=False)
class StateStep:
    """What the mixers need of a step: whose rows are where, and which slots are theirs."""

    pool: StatePool
    slots: Tensor  # [B] int64; −1: nobody's
    q_lens: list[int]  # rows of each sequence, in their order
    fresh: list[bool]  # whether they are the sequence's first
    _calls: dict[tuple[torch.device, bool], list[MixerCall]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, cache: KVCache) -> StateStep | None:
        """Of a batch over a cache; None where no layer keeps states."""
        if cache.states is None or batch.state_slots is None:
            return None
        fresh = [kv == q for kv, q in zip(batch.kv_lens, batch.q_lens, strict=True)]
        return cls(cache.states, batch.state_slots, batch.q_lens, fresh)

    @classmethod
    def of_new(cls, plan: StatePlan, q_lens: Sequence[int]) -> StateStep:
        """The first step of so many sequences, with slots of their own."""
        pool = StatePool(plan, len(q_lens))
        return cls(pool, torch.arange(len(q_lens)), list(q_lens), [True] * len(q_lens))

    @cached_property
    def places(self) -> Places:
        """For native kernels, where rows and states lie: the slot of nobody, −1, is the last."""
        starts = torch.tensor([0, *accumulate(self.q_lens)])
        return Places(starts, self.slots.remainder(self.pool.slots + self.pool.snapshots + 1))

    def calls(self, device: torch.device, by_token: bool) -> list[MixerCall]:
        """The calls that a mixer on `device` gets. `by_token`: one for each token, where rows have others before."""
        key = device, by_token
        if key not in self._calls:
            self._calls[key] = list(self._cut(self.slots.to(device), by_token))
        return self._calls[key]

    def _cut(self, slots: Tensor, by_token: bool) -> Iterator[MixerCall]:
        if all(n == 1 for n in self.q_lens):
            yield MixerCall(slice(None), slots, len(self.q_lens), 1)
            return
        start, lone, owners = 0, [], []
        for i, (n, fresh) in enumerate(zip(self.q_lens, self.fresh, strict=True)):
            if n == 1:
                lone.append(start)
                owners.append(i)
            elif by_token and not fresh:
                for row in range(start, start + n):
                    yield MixerCall(slice(row, row + 1), slots[i : i + 1], 1, 1)
            else:
                yield MixerCall(slice(start, start + n), slots[i : i + 1], 1, n)
            start += n
        if lone:
            rows, of = torch.tensor([lone, owners], device=slots.device)
            yield MixerCall(rows, slots[of], len(lone), 1)


_step: ContextVar[StateStep | None] = ContextVar("step", default=None)


def stepping(step: StateStep | None) -> AbstractContextManager[None]:
    """Within, the mixers of this thread's forward compute a step."""
    return during(_step, step)


class HeldStates:
    """The cache that a mixer is called with: the states of some sequences in its own layer."""

    # ruff: noqa: ARG002  (the interface is transformers')

    def __init__(self, states: dict[Name, Tensor]):
        self.states = states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(("recurrent", state_idx))

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """All columns that a convolution over the new ones sees; the last of them are kept."""
        old = self.states["conv", state_idx]
        seen = torch.cat([old, conv_states], -1)
        self.states["conv", state_idx] = seen[..., -old.shape[-1] :]
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self.states["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return True

    def is_recording_past(self, *_: Any) -> bool:
        return False


@dataclass
class Mixer:
    """What is known of a module that keeps states."""

    index: int  # among them, in the order of their layers
    layer: int  # its number in the model
    states: tuple[StateShape, ...]
    parameters: list[str]  # of its forward
    cache: str  # the one that is the cache
    rows: str  # the one that is its rows
    by_token: bool = False  # whether a call of several tokens forgets the states: chunks are computed token by token
    native: Callable[..., Tensor] | None = None  # its forward over all rows of a step, by native kernels


class PackedMixer(nn.Module):
    """A mixer's own class comes behind this one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        step = _step.get()
        if step is None:
            return super().forward(*args, **kwargs)
        mixer: Mixer = vars(self)[MIXER]
        arguments = dict(zip(mixer.parameters, args, strict=False)) | kwargs
        packed: Tensor = arguments.pop(mixer.rows)[0]
        arguments.pop(mixer.cache, None)
        pool = step.pool.layers[mixer.index]
        if mixer.native is not None:
            with reading(step.places, pool):
                return mixer.native(self, **{mixer.rows: packed[None]}, **arguments)
        out: Tensor | None = None
        for call in step.calls(packed.device, mixer.by_token):
            rows = packed[call.rows].view(call.sequences, call.tokens, -1)
            held = HeldStates({name: memory[call.slots] for name, memory in pool.items()})
            found = super().forward(**{mixer.rows: rows, mixer.cache: held}, **arguments).flatten(0, 1)
            for name, memory in pool.items():
                memory[call.slots] = held.states[name].to(memory.dtype)
            if len(found) == len(packed):
                return found[None]
            if out is None:
                out = found.new_empty(len(packed), *found.shape[1:])
            out[call.rows] = found
        assert out is not None
        return out[None]


def native_mixers(hf: nn.Module) -> list[nn.Module]:
    """The mixers of a model that native kernels compute."""
    return [
        module for module in hf.modules() if isinstance(module, PackedMixer) and vars(module)[MIXER].native is not None
    ]


def own_forward(module: nn.Module) -> Any:
    """A module's forward as transformers made it."""
    return super(PackedMixer, module).forward if isinstance(module, PackedMixer) else module.forward


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class as transformers made it."""
    return next(
        kind for kind in type(module).__mro__ if issubclass(kind, nn.Module) and not issubclass(kind, PackedMixer)
    )
