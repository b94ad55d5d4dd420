"""What the native extensions share on the side of Python: how one is loaded, torch's threads, numbers of types, checks,
and who listens to calls.

An extension may be missing (no compiler when the package was installed): `load` says why, and its caller does without.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from octavo.contexts import during
from octavo.errors import OctavoError

LIMIT = "OCTAVO_ISA"  # environment: an instruction set that the kernels are limited to, for tests and benchmarks


def expect(right: bool, what: str) -> None:
    """Raise ValueError where kernels, which get addresses, would read or write beyond a tensor."""
    if not right:
        raise ValueError(f"the native kernels expect {what}")


def address(x: torch.Tensor | None) -> int:
    """As kernels take a tensor that may be left out."""
    return 0 if x is None else x.data_ptr()


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, those of the last dimension next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Extension:
    """A native extension: its functions, and why they cannot be used here."""

    module: Any  # None where it is not built
    unavailable: str | None  # None where they can be used

    @property
    def isas(self) -> list[str]:
        """The instruction sets of this build that the processor has, the best first."""
        return self.module.isas() if self.module is not None else []

    @cached_property
    def floats(self) -> dict[torch.dtype, int]:
        """The kernels' numbers of the types that they compute with."""
        found = self.module.FLOATS if self.module is not None else {}
        return {getattr(torch, name): number for name, number in found.items()}

    @property
    def has_bf16(self) -> bool:
        """Whether products of bf16 numbers are the processor's fastest: AMX, AVX512-BF16, NEON with BF16. A limited
        instruction set is taken for a processor that has none."""
        return self.unavailable is None and not os.environ.get(LIMIT) and self.module.has_bf16()

    @contextmanager
    def limited_to(self, isa: str) -> Iterator[None]:
        """Use an instruction set for a while, in this process."""
        before = self.module.isa()
        self.module.use(isa)
        try:
            yield
        finally:
            self.module.use(before)


def load(name: str) -> Extension:
    """The extension of that name, which runs on torch's own threads.

    Raises OctavoError where LIMIT names an instruction set that is not there.
    """
    try:
        extension = import_module(name)
    except ImportError as error:
        return Extension(None, f"the native extension is not built ({error})")
    if limit := os.environ.get(LIMIT):
        if limit not in extension.isas():
            raise OctavoError(f"{LIMIT} is {limit}: this build has, for this processor, {', '.join(extension.isas())}")
        extension.use(limit)
    try:
        extension.set_parallel_for(_torch_parallel_for())
    except (OSError, AttributeError, StopIteration) as error:
        return Extension(extension, f"this torch exports no thread pool ({error})")
    return Extension(extension, None)


Listener = Callable[[Callable[..., Any], tuple[Any, ...]], None]


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def listening(listener: Listener) -> AbstractContextManager[None]:
    """Within, `listener` is told of each call of a kernel by this thread: the function, and its arguments."""
    return during(_listener, listener)


def functions(extension: Extension) -> Any:
    """What an extension has, its functions so that `listening` hears of calls that return no object."""
    names = vars(extension.module) if extension.module is not None else {}
    kinds = (type, int, str)
    return SimpleNamespace(**{name: x if isinstance(x, kinds) or not callable(x) else _heard(x)
                              for name, x in names.items()})  # fmt: skip


def _heard(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        result = function(*args)
        if (listener := _listener.get()) is not None and (result is None or isinstance(result, int)):
            listener(function, args)
        return result

    return call


def _torch_parallel_for() -> int | None:
    """The address of torch's own parallel loop. Raises OSError, AttributeError or StopIteration where it has none."""
    library = Path(torch.__file__).parent / "lib"
    torch_cpu = ctypes.CDLL(str(next(library.glob("libtorch_cpu.*"))))
    return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value
