"""Linear layers that a model gives the same rows, one after another, as q, k and v: one product in place of several.

They are found by a trial run. The first that is called computes the others' rows too, and keeps them, for the thread
that runs the forward, until they are asked for with the very same tensor.
"""

from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor, nn

from octavo.models.changes import Undo, become, watched
from octavo.weights import cpu
from octavo.weights.panels import PanelLinear

# Rows, and what other layers of the group of which one was called make of them.
_kept: ContextVar[tuple[Tensor, dict[nn.Module, Tensor]] | None] = ContextVar("kept", default=None)


class JoinedLinear(PanelLinear):
    group: list[PanelLinear]  # of one number of inputs and one type of weights, itself among them

    def forward(self, x: Tensor) -> Tensor:
        kept = _kept.get()
        if kept is None or kept[0] is not x or self not in kept[1]:
            operands = [layer.operand(x) for layer in self.group]
            ys = cpu.multiply_together(operands, x.reshape(-1, self.in_features))
            kept = x, dict(zip(self.group, ys, strict=True))
        y = kept[1].pop(self)
        _kept.set(kept if kept[1] else None)
        return y.view(*x.shape[:-1], self.out_features)


def join(model: nn.Module, run: Callable[[], object]) -> Iterator[Undo]:
    """Join the layers in panels that `run`, a forward, gives the same rows one after another, in place."""
    calls: list[tuple[PanelLinear, Tensor]] = []

    def note(module: PanelLinear, inputs: tuple[Tensor, ...]) -> None:
        calls.extend((module, x) for x in inputs[:1])

    with watched(module.register_forward_pre_hook(note) for module in model.modules() if type(module) is PanelLinear):
        run()
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
            yield from (become(layer, JoinedLinear, group=layers) for layer in layers)
