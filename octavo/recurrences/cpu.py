"""The recurrences of state layers by the native CPU kernels (native/recurrences.h has their formulas).

Rows of a step are packed, and every sequence's states lie in its slot of a pool, where they are read and written. A row
is computed after the row before it, with the same sums in the same order whatever the step consists of: so answers do
not depend on how work was cut, bit for bit. All is float32, and other types are converted.

The extension may be missing (no compiler when the package was installed): `refuses` says why.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo import native
from octavo.devices import HOST
from octavo.native import address, expect, in_rows

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

    def given(self, rows: int, states: Tensor, *shape: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        """These, and `states` that have that shape in each slot, as the kernels take them, which see that they are of
        so many rows and slots."""
        numbers = all(x.dtype == torch.int64 and x.is_contiguous() for x in (self.starts, self.slots))
        expect(numbers and len(self.starts) == len(self.slots) + 1, "first rows of all sequences, and a slot of each")
        right = states.dtype == torch.float32 and states.shape[1:] == shape and states[0].is_contiguous()
        expect(right, "states in float32, of the shape that the rows have, each slot's in one piece")
        step = len(self.slots), self.starts.data_ptr(), self.slots.data_ptr(), rows, len(states)
        return step, (states.data_ptr(), states.stride(0))


def convolve(places: Places, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, states: Tensor) -> Tensor:
    """Causal convolutions of x [T, channels] by weight [channels, taps]; states [slots, channels, kept]."""
    x, (rows, channels), (_, taps), kept = in_rows(x.float()), x.shape, weight.shape, states.shape[2]
    own, bias = _whole(weight, channels, taps), _whole(bias, channels)
    expect(kept >= taps - 1, "states of all rows that a weight reaches")
    step, pool = places.given(rows, states, channels, kept)
    y = torch.empty(rows, channels)
    _native.convolve(
        step, _strides(x, rows, channels), channels, address(own), taps, address(bias), silu, pool, kept,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def delta_rule(
    places: Places, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, normalize: bool, states: Tensor
) -> Tensor:
    """The gated delta rule of q and k [T, k_heads, k_dim], v [T, heads, v_dim], g [T, heads] or [T, heads, k_dim], beta
    [T, heads]; states [slots, heads, k_dim, v_dim]."""
    q, k, v, g, beta = (in_rows(one.float()) for one in (q, k, v, g, beta))
    (rows, heads, v_dim), (_, k_heads, k_dim), by_channel = v.shape, k.shape, g.dim() == 3
    expect(heads % k_heads == 0, "heads that those of k divide")
    step, pool = places.given(rows, states, heads, k_dim, v_dim)
    y = torch.empty(rows, heads, v_dim)
    _native.delta_rule(
        step, _strides(q, rows, k_heads, k_dim), _strides(k, rows, k_heads, k_dim), _strides(v, rows, heads, v_dim),
        _strides(g, rows, heads, *([k_dim] if by_channel else [])), _strides(beta, rows, heads), heads,
        heads // k_heads, k_dim, v_dim, by_channel, normalize, pool, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def scan(
    places: Places, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, bias: Tensor | None,
    softplus: bool, limits: tuple[float, float], states: Tensor,
) -> Tensor:  # fmt: skip
    """A state-space model of x [T, heads, p_dim], dt [T, heads], b and c [T, groups, n_dim], a, d and bias [heads];
    states [slots, heads, p_dim, n_dim]."""
    x, dt, b, c = (in_rows(one.float()) for one in (x, dt, b, c))
    (rows, heads, p_dim), (_, groups, n_dim) = x.shape, b.shape
    decay, d, bias = (_whole(one, heads) for one in (a, d, bias))
    expect(heads % groups == 0, "heads that the groups divide")
    step, pool = places.given(rows, states, heads, p_dim, n_dim)
    y = torch.empty(rows, heads, p_dim)
    _native.scan(
        step, _strides(x, rows, heads, p_dim), _strides(dt, rows, heads), _strides(b, rows, groups, n_dim),
        _strides(c, rows, groups, n_dim), address(decay), address(d), address(bias), softplus, *limits, heads,
        heads // groups, p_dim, n_dim, pool, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def selective_scan(
    places: Places, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, states: Tensor,
) -> Tensor:  # fmt: skip
    """A state-space model with a decay of its own for every channel and state: x, dt and the gate z [T, channels], b
    and c [T, n_dim], a [channels, n_dim], d and bias [channels]; states [slots, channels, n_dim]."""
    x, dt, z = x.float(), dt.float(), None if z is None else z.float()
    b, c = in_rows(b.float()), in_rows(c.float())
    (rows, channels), (_, n_dim) = x.shape, b.shape
    decay, d, bias = _whole(a, channels, n_dim), _whole(d, channels), _whole(bias, channels)
    step, pool = places.given(rows, states, channels, n_dim)
    y = torch.empty(rows, channels)
    _native.selective_scan(
        step, _strides(x, rows, channels), _strides(dt, rows, channels), _strides(b, rows, n_dim),
        _strides(c, rows, n_dim), (0, 0, 0) if z is None else _strides(z, rows, channels), address(decay), address(d),
        address(bias), softplus, channels, n_dim, pool, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _whole(x: Tensor | None, *shape: int) -> Tensor | None:
    """In float32 and contiguous, of that shape."""
    expect(x is None or x.shape == shape, "weights of the shape that the rows have")
    return None if x is None else x.float().contiguous()


def _strides(x: Tensor, *shape: int) -> tuple[int, int, int]:
    """Address, and strides of rows and of what comes after them, of rows of that shape."""
    expect(x.shape == shape, "the rows of a step, of one geometry")
    return x.data_ptr(), x.stride(0), x.stride(1)
