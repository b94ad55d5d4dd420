"""Linear layers that a model gives the same rows, one after another, as q, k and v: one product in place of several.

They are found by a trial run. The first that is called computes the others' rows too, and keeps them, for the thread
that runs the forward, until they are asked for with the very same tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import Tensor, nn

from octavo.weights import cpu
from octavo.weights.panels import PanelLinear

Undo = Callable[[], None]


@dataclass
class Group:
    """Layers of one number of inputs and one type of weights."""

    layers: list[JoinedLinear]


class _Kept(threading.local):
    """What layers of a group, of which another was called, make of some rows."""

    group: Group | None = None
    x: Tensor | None = None
    ys: dict[nn.Module, Tensor]


_kept = _Kept()


class JoinedLinear(PanelLinear):
    group: Group

    def forward(self, x: Tensor) -> Tensor:
        if _kept.group is not self.group or _kept.x is not x or self not in _kept.ys:
            operands = [layer.operand(x) for layer in self.group.layers]
            ys = cpu.multiply_together(operands, x.reshape(-1, self.in_features))
            _kept.group, _kept.x = self.group, x
            _kept.ys = dict(zip(self.group.layers, ys, strict=True))
        y = _kept.ys.pop(self)
        if not _kept.ys:
            _kept.group = _kept.x = None
        return y.view(*x.shape[:-1], self.out_features)


def join(model: nn.Module, run: Callable[[], object]) -> Iterator[Undo]:
    """Join the layers in panels that `run`, a forward, gives the same rows one after another, in place."""
    calls: list[tuple[PanelLinear, Tensor]] = []

    def note(module: PanelLinear, inputs: tuple[Tensor, ...]) -> None:
        calls.extend((module, x) for x in inputs[:1])

    handles = [module.register_forward_pre_hook(note) for module in model.modules() if type(module) is PanelLinear]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[PanelLinear]] = []
    before: Tensor | None = None
    for module, x in calls:
        if before is x and module.weight.dtype == groups[-1][0].weight.dtype:
            groups[-1].append(module)
        else:
            groups.append([module])
        before = x
    called = [id(module) for module, _ in calls]
    for layers in groups:
        if len(layers) > 1 and all(called.count(id(layer)) == 1 for layer in layers):
            group = Group([])
            for layer in layers:
                layer.__class__ = JoinedLinear
                joined = cast(JoinedLinear, layer)
                joined.group = group
                group.layers.append(joined)
                yield partial(_part, layer)


def _part(layer: PanelLinear) -> None:
    layer.__class__ = PanelLinear
    del layer.group
