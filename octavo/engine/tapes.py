"""Decode steps on a CPU as tapes: the operations of a step one after another, without the Python that led there.

A model's own code goes through modules, views and keyword arguments to say what is to be computed; of a small model
that takes longer than the products. A step in which every sequence computes one token does the same whatever its
sequences, but for their number. So the second step of a number is run over memory that stays where it is
(graphs.StepBuffers), and what it calls is noted: operations of torch that compute something, and native kernels. Later
steps of that number are copied in, and the calls are made again on the same tensors. They are the same operations in
the same order, so the same bits.

A step that looks at values on the host, or whose shapes depend on them, is not recorded. Nor is a model whose modules
have hooks, which a tape would leave out. Tapes are made anew where hooks have come since, or threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from octavo import native
from octavo.cache.batch import Batch
from octavo.engine.graphs import Forward, StepBuffers
from octavo.interrupts import let_through
from octavo.models.bind import BoundModel
from octavo.models.hook import OF_ALL_MODULES

MOST = 16  # sequences: a larger step computes for longer than it takes to say what
LONGEST = 1 << 18  # tokens: a model may name no limit, and tables of blocks have one here
ROOM = 128 << 20  # bytes that the tapes of an engine may take, for what lies between operations
Call = Callable[[], object]
UNFILLED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
COPIES = {"clone", "contiguous", "reshape", "to", "_to_copy"}
UNSEEN = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}  # ways to values past torch's dispatcher
ON_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
aten = torch.ops.aten
# Composite operations that look there too, and come without a tag in inference mode:
UNTAGGED = {aten.is_nonzero.default, aten.where.default, aten.narrow.Tensor, aten.repeat_interleave.Tensor,
            aten.repeat_interleave.self_Tensor, aten.tensor_split.tensor_indices_or_sections}  # fmt: skip
LITERALS = {"lift", "lift_fresh", "lift_fresh_copy"}  # tensors of Python's numbers


class DecodeTapes:
    """Takes decode steps of up to `buffers.rows` sequences as `DecodeGraphs` does, and records them as they come."""

    def __init__(self, model: BoundModel, forward: Forward, buffers: StepBuffers):
        self.model, self.forward, self.buffers = model, forward, buffers
        self.tapes: dict[int, Tape] = {}
        self.seen: Counter[int] = Counter()
        self.made: tuple[int, int] | None = None  # the hooks there had ever been, and the threads, when tapes were made
        self.refused: str | None = None  # why no step of this model is recorded
        self.full = False  # whether there is room for no more tapes

    def takes(self, batch: Batch) -> bool:
        """Whether this is a decode step that has a tape, or gets one now."""
        if self.refused is not None or not self.buffers.holds(batch):
            return False
        if self.made != (now := (RemovableHandle.next_id, torch.get_num_threads())):
            self.tapes, self.seen, self.full, self.made = {}, Counter(), False, now
            self.refused = _refusal(self.model)
        rows = len(batch.q_lens)
        self.seen[rows] += 1
        return rows in self.tapes or (self.refused is None and not self.full and self.seen[rows] > 1)

    def run(self, batch: Batch) -> Tensor:
        """Logits [sequences, vocabulary]; they stay until the next step of as many."""
        rows = len(batch.q_lens)
        self.buffers.load(batch, rows)
        if (tape := self.tapes.get(rows)) is not None:
            with let_through() if self.model.interruptible else nullcontext():
                return tape.play()
        recorder = Recorder(self.model)
        with recorder:
            logits = self.forward(self.buffers.batch(rows))
        self.refused = recorder.refused
        self.full = self.nbytes + recorder.nbytes > ROOM
        if self.refused is None and not self.full:
            self.tapes[rows] = Tape(recorder, logits)
        return logits

    @property
    def nbytes(self) -> int:
        """Bytes that the tapes take."""
        return sum(tape.nbytes for tape in self.tapes.values())


def _refusal(model: BoundModel) -> str | None:
    """Why no step of a model is recorded."""
    if any(OF_ALL_MODULES):
        return "all modules have hooks"
    for module in model.hf.modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"{type(module).__name__} has hooks"
    return None


class Tape:
    """What a step has called, to be called again."""

    def __init__(self, recorder: Recorder, logits: Tensor):
        self.calls, self.kept, self.logits = recorder.calls, recorder.kept, logits
        self.nbytes = recorder.nbytes

    @torch.inference_mode()
    def play(self) -> Tensor:
        for call in self.calls:
            call()
        return self.logits


class Recorder:
    """Within, what this thread computes is noted."""

    def __init__(self, model: BoundModel):
        self.calls: list[Call] = []
        self.kept: list[Tensor] = []  # all that is computed: its memory must stay
        self.nbytes = 0  # of that
        self.constant = {_place(x) for x in (*model.hf.parameters(), *model.hf.buffers())}  # memory that no step writes
        self.refused: str | None = None
        self._within = (_Operations(self), _Reads(self), native.listening(self._kernel))

    def __enter__(self) -> None:
        for each in self._within:
            each.__enter__()

    def __exit__(self, *error: Any) -> None:
        for each in reversed(self._within):
            each.__exit__(*error)

    def _kernel(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.calls.append(partial(function, *args))

    def operation(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Of torch: `function` has given `result`."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.kept += given + found
        memory = set(map(_place, given))
        self.nbytes += sum(x.nbytes for x in found if _place(x) not in memory)
        if _looks(function, given):
            self.refused = f"a step looks at values on the host: {function}"
        elif function._opname == "detach_":  # of a literal: changes no number
            return
        elif function._schema.is_mutable:
            if _place(kwargs.get("out", args[0])) in self.constant:
                self.refused = f"a step writes what others read: {function}"
            self.calls.append(partial(function, *args, **kwargs))
        elif function._opname in LITERALS or (given and memory <= self.constant):  # the same in every step
            self.constant |= set(map(_place, found))
        elif function._opname not in UNFILLED and (new := [x for x in found if x.numel() and _place(x) not in memory]):
            self.calls.append(_into(function, args, kwargs, found, new))


def _place(x: Tensor) -> int:
    """The address of the memory that a tensor lies in."""
    return x.untyped_storage().data_ptr()


def _looks(function: Any, given: Iterable[Tensor]) -> bool:
    """Whether what an operation gives depends on values that the host has to know. An index of numbers does not."""
    if function._opname == "index":
        return any(x.dtype in (torch.bool, torch.uint8) for x in list(given)[1:])
    return function in UNTAGGED or not ON_HOST.isdisjoint(function.tags)


def _into(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: list[Tensor], new: list[Tensor]) -> Call:
    """Computes again what is `new` of the tensors that were `found`, where it lies."""
    if function._opname in COPIES and new[0].is_contiguous():
        return partial(new[0].view(args[0].shape).copy_, args[0])
    if (writing := _writing(function)) is not None and len(found) == 1:
        return partial(writing, *args, **kwargs, out=new[0])

    def again() -> None:
        for x, y in zip(found, tree_leaves(function(*args, **kwargs)), strict=True):
            if any(x is each for each in new):
                x.copy_(y)

    return again


@lru_cache
def _writing(function: Any) -> Any:
    """The same operation into a tensor that is there already; None if torch has none."""
    own = [(x.name, str(x.type)) for x in function._schema.arguments]
    packet = function.overloadpacket
    for name in packet.overloads():
        other = getattr(packet, name)
        outs = [x.name for x in other._schema.arguments if x.is_out]
        if outs == ["out"] and own == [(x.name, str(x.type)) for x in other._schema.arguments if not x.is_out]:
            return other
    return None


class _Operations(TorchDispatchMode):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.recorder.operation(function, args, kwargs or {}, result)
        return result


class _Reads(TorchFunctionMode):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in UNSEEN:
            self.recorder.refused = f"a step looks at values on the host: {function.__name__}"
        return function(*args, **(kwargs or {}))
