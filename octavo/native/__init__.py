"""What the native extensions share on the side of Python: how one is loaded, torch's threads, and numbers of types.

An extension may be missing (no compiler when the package was installed): `load` says why, and its caller does without.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

FLOATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # types.h: Float


def load(name: str) -> tuple[Any, str | None]:
    """The extension of that name, which runs on torch's own threads, or None; and why it cannot be used, or None."""
    try:
        extension = import_module(name)
    except ImportError as error:
        return None, f"the native extension is not built ({error})"
    try:
        extension.set_parallel_for(_torch_parallel_for())
    except (OSError, AttributeError, StopIteration) as error:
        return extension, f"this torch exports no thread pool ({error})"
    return extension, None


def _torch_parallel_for() -> int | None:
    """The address of torch's own parallel loop. Raises OSError, AttributeError or StopIteration where it has none."""
    library = Path(torch.__file__).parent / "lib"
    torch_cpu = ctypes.CDLL(str(next(library.glob("libtorch_cpu.*"))))
    return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value
