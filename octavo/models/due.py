"""The last layer of a model, computed for the rows that are due alone.

Of most rows of a prompt nobody asks for logits: the last layer owes the cache their keys and values, and nothing else.
So its forward runs twice, both times by the model's own code: over all rows as far as attention, which writes and
answers them, then over the rows that are due, which are given their answers. What comes after attention makes of a row
what depends on that row alone, or a trial shows that it does not and the layer is left as it was.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from octavo.contexts import during
from octavo.models import hook
from octavo.models.bind import BoundModel
from octavo.models.changes import Undo, become


class _Answered(Exception):
    """Attention's answer, on its way out of a layer of which nothing else is needed."""


class LastLayer(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        due, attend = hook.due.get(), hook.attended.get()
        if due is None:
            return super().forward(*args, **kwargs)
        assert callable(attend), "a recorder sees all rows"

        def answer(*of_all: Any) -> Tensor:
            raise _Answered(attend(*of_all))

        try:
            with during(hook.attended, answer):
                super().forward(*args, **kwargs)
            raise AssertionError("the last layer did not reach attention")
        except _Answered as answered:
            found: Tensor = answered.args[0]
        args, kwargs = _some(args, due, len(found)), _some(kwargs, due, len(found))
        with during(hook.attended, lambda *_: found[due]):
            return super().forward(*args, **kwargs)


def _some(x: Any, rows: Tensor, count: int) -> Any:
    """What a layer is given, of some rows: of tensors [1, count, …], wherever they are."""
    if isinstance(x, Tensor):
        return x[:, rows] if x.dim() > 1 and x.shape[:2] == (1, count) else x
    if isinstance(x, tuple | list):
        return type(x)(_some(each, rows, count) for each in x)
    if isinstance(x, dict):
        return {name: _some(each, rows, count) for name, each in x.items()}
    return x


def shorten(bound: BoundModel) -> Iterator[Undo]:
    """Have the last layer of a model compute what is due, in place. Nothing is done where it keeps a state, which would
    go on twice, or has attention more than once."""
    layer = _last_layer(bound)
    if layer is None or bound.states:
        return
    put_back = become(layer, LastLayer)

    def undo() -> None:
        bound.shortened = False
        put_back()

    bound.shortened = True
    yield undo


def _last_layer(bound: BoundModel) -> nn.Module | None:
    """The last of the model's layers, if it is the one that calls attention last, and calls it once."""
    modules = hook.attention_modules(bound.hf)
    last = modules.get(len(bound.layers) - 1)
    for layers in bound.hf.modules():
        if isinstance(layers, nn.ModuleList) and len(layers):
            own = [module for module in layers[-1].modules() if module in modules.values()]
            if own == [last]:
                return layers[-1]
    return None
