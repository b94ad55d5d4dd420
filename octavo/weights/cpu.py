"""A model's layers by the native CPU kernels: products of 4-bit weights (native/int4.cpp) and of others in panels
(native/panels.cpp), and what comes between products (native/elementwise.cpp).

The extension may be missing (no compiler when the package was installed): `unavailable()` says why.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octavo import native
from octavo.devices import HOST
from octavo.native import FLOATS

FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # native/elementwise.h
extension = native.load("octavo.weights._native")
_native = native.functions(extension)

Weight = tuple[Tensor, int, Tensor | None]
"""Panels, outputs, and a bias of the rows' type. What is multiplied together has one type and number of inputs."""


Norm = tuple[Tensor, float]
"""Scale and epsilon of an RMS norm."""


def unavailable() -> str | None:
    """Why the kernels cannot be used here; None if they can."""
    return extension.unavailable


def refuses(device: torch.device) -> str | None:
    """Why weights on that device are not the kernels' to multiply; None if they are."""
    return unavailable() if device == HOST else f"the weights are on {device}"


def matrix(codes: Tensor, scales: Tensor, zeros: Tensor, out: int, columns: int, group: int) -> Any:
    """The kernels' view of a weight: valid as long as the tensors are."""
    return _native.Matrix(
        out, columns, group, codes.data_ptr(), scales.data_ptr(), FLOATS[scales.dtype], zeros.data_ptr()
    )


def multiply(matrix: Any, out: int, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in] → [rows, out] of the same type, sums in float32 and rounded once."""
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(len(x), out, dtype=x.dtype)
    _native.multiply(
        matrix, x.data_ptr(), len(x), x.stride(0), FLOATS[x.dtype], 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def decode(matrix: Any, first: int, into: Tensor) -> Tensor:
    """Rows of the weight from `first`, a multiple of 16, into [count, in]."""
    _native.decode(matrix, first, len(into), FLOATS[into.dtype], into.data_ptr(), torch.get_num_threads())
    return into


def pack_panels(weight: Tensor) -> Tensor:
    """A weight [out, in] in panels of 16 outputs: [⌈out/16⌉, in, 16], the last padded with zeros."""
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    out, columns = weight.shape
    panels = torch.empty(-(-out // _native.PANEL), columns, _native.PANEL, dtype=weight.dtype)
    _native.pack_panels(
        weight.data_ptr(), out, columns, weight.stride(0), weight.itemsize, panels.data_ptr(), torch.get_num_threads()
    )
    return panels


def multiply_panels(panels: Tensor, out: int, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in] → [rows, out] of the same type: products and sums in float32, rounded once."""
    return multiply_together([(panels, out, bias)], x)[0]


def multiply_together(weights: Sequence[Weight], x: Tensor) -> list[Tensor]:
    """The same for several weights, in one pass over the rows."""
    ys = [torch.empty(len(x), out, dtype=x.dtype) for _, out, _ in weights]
    _multiply(weights, x, ys, gated=False)
    return ys


def multiply_gated(gate: Weight, up: Weight, x: Tensor) -> Tensor:
    """silu(x·gate) ∘ (x·up) of two weights of one size; x [rows, in] is float32."""
    y = torch.empty(len(x), gate[1], dtype=x.dtype)
    _multiply((gate, up), x, (y, None), gated=True)
    return y


def _multiply(weights: Sequence[Weight], x: Tensor, ys: Sequence[Tensor | None], gated: bool) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    products = [number for (panels, out, bias), y in zip(weights, ys, strict=True)
                for number in (out, panels.data_ptr(), _address(bias), _address(y))]  # fmt: skip
    panels = weights[0][0]
    _native.multiply_panels(
        products, gated, panels.shape[1], FLOATS[panels.dtype], x.data_ptr(), len(x), x.stride(0), FLOATS[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def activate(function: str, x: Tensor) -> Tensor:
    """One of FUNCTIONS of every number, computed in float32: of x's shape and type."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _native.activate(
        FUNCTIONS[function], x.data_ptr(), x.numel(), FLOATS[x.dtype], y.data_ptr(), torch.get_num_threads()
    )
    return y


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., dim] / √(mean(x²) + epsilon) ∘ weight [dim], all float32."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.rms_norm(
        rows.data_ptr(), len(rows), rows.stride(0), rows.shape[1], weight.data_ptr(), epsilon, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float, group: int, gate_first: bool) -> Tensor:
    """The same of each `group` of a row's numbers: norm(x ∘ silu(gate)) ∘ weight, or norm(x) ∘ weight ∘ silu(gate).
    x and gate [..., dim], weight [dim], all float32."""
    rows, gates = (t.reshape(-1, t.shape[-1]) for t in (x, gate))
    rows, gates = (t if t.stride(1) == 1 else t.contiguous() for t in (rows, gates))
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.gated_norm(
        rows.data_ptr(), rows.stride(0), gates.data_ptr(), gates.stride(0), *rows.shape, group, weight.data_ptr(),
        epsilon, gate_first, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def silu_gate_(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up in the place of `gate`; both contiguous, of one shape, float32."""
    _native.silu_gate(gate.data_ptr(), up.data_ptr(), gate.numel(), torch.get_num_threads())
    return gate


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [rows, heads, dim] by cos and sin [rows, dim], whose rows are contiguous, all float32:
    x ∘ cos + (−second half of x, first half) ∘ sin, contiguous."""
    rows, heads, dim = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.rope(
        x.data_ptr(), heads, x.stride(1), x.stride(0), rows, dim, cos.data_ptr(), cos.stride(0), sin.data_ptr(),
        sin.stride(0), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


class Layer:
    """A decoder layer of the usual form as native/layer.h has it. `norms` before attention, behind it, of q and of k
    are (scale, epsilon), the last two may be None; `linears` are q, k, v, o, gate, up and down, all of one type."""

    def __init__(self, heads: int, kv_heads: int, dim: int, norms: Sequence[Norm | None], linears: Sequence[Weight]):
        self.heads, self.kv_heads, self.dim, self.inner = heads, kv_heads, dim, linears[4][1]
        self.keep = norms, linears  # as long as their addresses
        addresses = [(out, panels.shape[1], panels.data_ptr(), _address(bias)) for panels, out, bias in linears]
        self.native = _native.layer(
            heads, kv_heads, dim, FLOATS[linears[0][0].dtype],
            [(0, 0.0) if norm is None else (norm[0].data_ptr(), norm[1]) for norm in norms], addresses,
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        """Of a copied model: by the addresses of its own weights."""
        return Layer(self.heads, self.kv_heads, self.dim, *copy.deepcopy(self.keep, memo))

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [rows, heads, dim], k and v [rows, kv_heads, dim] of x [rows, width], with cos and sin [rows, dim]."""
        rows = len(x)
        q = torch.empty(rows, self.heads, self.dim, dtype=x.dtype)
        k, v = torch.empty(2, rows, self.kv_heads, self.dim, dtype=x.dtype).unbind()
        h = torch.empty_like(x)
        _native.before_attention(
            self.native, x.data_ptr(), rows, cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0),
            h.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return q, k, v

    def after_attention(self, answers: Tensor, x: Tensor) -> Tensor:
        """What the layer makes of x [rows, width] and attention's answers [rows, heads, dim]."""
        rows = len(x)
        middle, y = torch.empty_like(x), torch.empty_like(x)
        inner = torch.empty(rows, self.inner, dtype=x.dtype)
        _native.after_attention(
            self.native, answers.data_ptr(), x.data_ptr(), rows, middle.data_ptr(), inner.data_ptr(), y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y


def peak(seconds: float) -> float:
    """Floating-point operations per second of a loop of multiply-adds on all threads, which takes about that long: the
    yardstick of benchmarks/products_cpu.py."""
    steps = 1 << 14
    while True:
        start = time.perf_counter()
        done = _native.spin(steps, torch.get_num_threads())
        taken = time.perf_counter() - start
        if taken >= seconds / 2:
            return done / taken
        steps *= 2
