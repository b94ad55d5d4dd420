"""The recurrences of state layers by the native CPU kernels (native/recurrences.h has their formulas).

Rows of a step are packed, and every sequence's states lie in its slot of a pool, where they are read and written. A row
is computed after the row before it, with the same sums in the same order whatever the step consists of: so answers do
not depend on how work was cut, bit for bit. All is float32, and other types are converted.

The extension may be missing (no compiler when the package was installed): `refuses` says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo import native
from octavo.devices import HOST

extension = native.load("octavo.recurrences._native")
_native = native.functions(extension)


def refuses(device: torch.device) -> str | None:
    """Why states on that device are not the kernels' to compute; None if they are."""
    return extension.unavailable if device == HOST else f"the states are on {device}"


@dataclass(frozen=True)
class Places:
    """Where the rows of a step's sequences lie, and their states."""

    starts: Tensor  # [sequences + 1] first rows, int64
    slots: Tensor  # [sequences] int64

    @property
    def args(self) -> tuple[int, int, int]:
        return len(self.slots), self.starts.data_ptr(), self.slots.data_ptr()


def convolve(places: Places, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, states: Tensor) -> Tensor:
    """Causal convolutions of x [T, channels] by weight [channels, taps]; states [slots, channels, kept]."""
    x, weight, bias = _rows(x), weight.float().contiguous(), _plain(bias)
    y = torch.empty(x.shape)
    _native.convolve(
        places.args, _strides(x), x.shape[1], weight.data_ptr(), weight.shape[1], _address(bias), silu,
        _states(states), states.shape[2], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def delta_rule(
    places: Places, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, normalize: bool, states: Tensor
) -> Tensor:
    """The gated delta rule of q and k [T, k_heads, k_dim], v [T, heads, v_dim], g [T, heads] or [T, heads, k_dim], beta
    [T, heads]; states [slots, heads, k_dim, v_dim]."""
    q, k, v, g, beta = map(_rows, (q, k, v, g, beta))
    rows, heads, v_dim = v.shape
    y = torch.empty(rows, heads, v_dim)
    _native.delta_rule(
        places.args, *map(_strides, (q, k, v, g, beta)), heads, heads // k.shape[1], k.shape[2], v_dim, g.dim() == 3,
        normalize, _states(states), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def scan(
    places: Places, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, bias: Tensor | None,
    softplus: bool, limits: tuple[float, float], states: Tensor,
) -> Tensor:  # fmt: skip
    """A state-space model of x [T, heads, p_dim], dt [T, heads], b and c [T, groups, n_dim], a, d and bias [heads];
    states [slots, heads, p_dim, n_dim]."""
    x, dt, b, c = map(_rows, (x, dt, b, c))
    a, d, bias = _given(a), _plain(d), _plain(bias)
    rows, heads, p_dim = x.shape
    y = torch.empty(rows, heads, p_dim)
    _native.scan(
        places.args, *map(_strides, (x, dt, b, c)), a.data_ptr(), _address(d), _address(bias), softplus, *limits, heads,
        heads // b.shape[1], p_dim, b.shape[2], _states(states), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def selective_scan(
    places: Places, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, states: Tensor,
) -> Tensor:  # fmt: skip
    """A state-space model with a decay of its own for every channel and state: x, dt and the gate z [T, channels], b
    and c [T, n_dim], a [channels, n_dim], d and bias [channels]; states [slots, channels, n_dim]."""
    x, dt, z = x.float(), dt.float(), None if z is None else z.float()
    b, c = _rows(b), _rows(c)
    a, d, bias = _given(a), _plain(d), _plain(bias)
    rows, channels = x.shape
    y = torch.empty(rows, channels)
    _native.selective_scan(
        places.args, *map(_strides, (x, dt, b, c)), (0, 0, 0) if z is None else _strides(z), a.data_ptr(), _address(d),
        _address(bias), softplus, channels, b.shape[1], _states(states), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    """In float32, the last dim contiguous."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _given(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else _given(x)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Address, and strides of rows and of what comes after them."""
    return x.data_ptr(), x.stride(0), x.stride(1) if x.dim() > 1 else 0


def _states(x: Tensor) -> tuple[int, int]:
    assert x.dtype == torch.float32 and x[0].is_contiguous(), "states are float32, each slot's in one piece"  # noqa: PT018
    return x.data_ptr(), x.stride(0)
