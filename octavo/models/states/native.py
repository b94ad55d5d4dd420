"""Mixers whose recurrence is one that the native kernels know: they compute all rows of a step at once.

A mixer's forward calls the recurrence and the convolution as functions of its file, which have the same names in every
file of transformers. It gets its own forward with other functions under those names. Called without a cache it computes
what it does for one sequence from its beginning, but for these functions, which read the states of every sequence from
the pool and leave them there.

It computes as it does for several tokens, also where there is one: what a token's recurrence is does not depend on how
many were computed together.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cache.states import Name
from octavo.contexts import during
from octavo.errors import Unsupported
from octavo.models.changes import with_functions
from octavo.recurrences import cpu
from octavo.recurrences.cpu import Places

SILU = {None: False, "silu": True, "swish": True}


# Of the mixer that this thread runs: where its rows lie, and its states in all slots.
_read: ContextVar[tuple[Places, dict[Name, Tensor]]] = ContextVar("read")


def reading(places: Places, states: dict[Name, Tensor]) -> AbstractContextManager[None]:
    """Within, the functions below compute the rows of one mixer."""
    return during(_read, (places, states))


def _convolve(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    if activation not in SILU:
        raise Unsupported(f"a convolution with {activation}")
    places, states = _read.get()
    out = cpu.convolve(places, hidden_states[0].T, weight, bias, SILU[activation], states["conv", 0])
    return out.to(hidden_states.dtype).T[None]


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    (places, states), rows = _read.get(), (query[0], key[0], value[0], g[0], beta[0])
    out = cpu.delta_rule(places, *rows, use_qk_l2norm_in_kernel, states["recurrent", 0])
    return out.to(query.dtype)[None], None


def _scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,  # noqa: ARG001
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> Tensor:
    if z is not None or A.dim() != 1 or (D is not None and D.dim() != 1):
        raise Unsupported("a scan of another form")
    low, high = map(float, dt_limit)
    (places, states), rows = _read.get(), (hidden_states[0], dt[0], A, B[0], C[0])
    out = cpu.scan(places, *rows, D, dt_bias, dt_softplus, (low, high), states["recurrent", 0])
    return out.to(hidden_states.dtype)[None]


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> Tensor:
    (places, states), gate = _read.get(), None if z is None else z[0].T
    rows = hidden_states[0].T, dt[0].T, A, B[0].T, C[0].T
    out = cpu.selective_scan(places, *rows, D, gate, delta_bias, delta_softplus, states["recurrent", 0])
    return out.to(hidden_states.dtype).T[None]


FUNCTIONS: dict[str, Callable[..., Any]] = {  # by their names in transformers' files
    "causal_conv1d_fn": _convolve,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _scan,
    "mamba_selective_scan": _selective_scan,
}


@lru_cache
def native_forward(kind: type[nn.Module], device: torch.device) -> Callable[..., Any] | None:
    """The forward of a class of mixers by native kernels; None where they do not know its functions."""
    if cpu.refuses(device) is not None:
        return None
    forward = inspect.unwrap(kind.forward)
    if not isinstance(forward, FunctionType):
        return None
    names = {name: ours for name, ours in FUNCTIONS.items() if name in forward.__code__.co_names}
    if not names:
        return None
    return with_functions(forward, names)
