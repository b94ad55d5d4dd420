"""Changes to a model in place that can be taken back, and whether what it computes is still the same."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor, nn

Undo = Callable[[], None]


def put(of: Any, name: str, value: Any) -> Undo:
    """Give an attribute another value."""
    old = getattr(of, name)
    setattr(of, name, value)
    return lambda: setattr(of, name, old)


def become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> Undo:
    """Put a class before a module's own: it may call its forward."""
    own, before = type(module), set(vars(module))
    for name, value in attributes.items():
        object.__setattr__(module, name, value)  # no parameter or buffer: nothing that is saved or moved
    module.__class__ = type(own.__name__, (kind, own), {"__module__": own.__module__, "__doc__": own.__doc__})

    def undo() -> None:
        module.__class__ = own
        for name in set(vars(module)) - before:
            delattr(module, name)

    return undo


def with_functions(forward: FunctionType, ours: Mapping[str, Callable[..., Any]]) -> FunctionType:
    """A forward that finds other functions under names of its file. The file, and other models made from it, stay as
    they are."""
    names = {**forward.__globals__, **ours}
    same = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    same.__kwdefaults__ = forward.__kwdefaults__
    return same


def close(own: Tensor, asked: Tensor, tolerance: float) -> bool:
    """Whether the norm of the difference is at most that share of the norm of what is asked for. NaN is not close."""
    return bool((own - asked).norm() <= tolerance * asked.norm())


@contextmanager
def watched(handles: Iterable[Any]) -> Iterator[None]:
    """Within, the hooks of these handles are there."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
