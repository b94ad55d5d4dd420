"""A model's layers by the native CPU kernels: products of 4-bit weights (native/int4.cpp) and of others in panels
(native/panels.cpp), and what comes between products (native/elementwise.cpp).

The extension may be missing (no compiler when the package was installed): `unavailable()` says why.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo import native
from octavo.devices import HOST
from octavo.native import address, expect, in_rows

extension = native.load("octavo.weights._native")
_native = native.functions(extension)
FLOATS = extension.floats

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


class Matrix(NamedTuple):
    """The kernels' view of a 4-bit weight: valid as long as its tensors are."""

    native: Any
    out: int
    columns: int
    rows: int  # of whole tiles


def matrix(codes: Tensor, scales: Tensor, zeros: Tensor, out: int) -> Matrix:
    """Of codes [tiles, in/8, 16, 4], and a scale and a zero of each group of inputs [tiles, groups, 16]."""
    tiles, columns, groups, tile = len(codes), 8 * codes.shape[1], scales.shape[1], _native.TILE
    right = (
        codes.shape[2:] == (tile, 4) and scales.shape == zeros.shape == (tiles, groups, tile) and out <= tile * tiles
    )
    expect(right and codes.dtype == zeros.dtype == torch.uint8, "codes, scales and zeros in tiles of outputs")
    expect(codes.is_contiguous() and scales.is_contiguous() and zeros.is_contiguous(), "contiguous tiles")
    native = _native.Matrix(
        out, columns, columns // groups, codes.data_ptr(), scales.data_ptr(), FLOATS[scales.dtype], zeros.data_ptr()
    )
    return Matrix(native, out, columns, tile * tiles)


def multiply(matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in] → [rows, out] of the same type, sums in float32 and rounded once."""
    x = in_rows(x)
    expect(x.shape[1] == matrix.columns, "rows of as many numbers as the weight has inputs")
    y = torch.empty(len(x), matrix.out, dtype=x.dtype)
    _native.multiply(
        matrix.native, x.data_ptr(), len(x), x.stride(0), FLOATS[x.dtype], _bias(bias, matrix.out, x), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def decode(matrix: Matrix, first: int, into: Tensor) -> Tensor:
    """Rows of the weight from `first`, a multiple of 16, into [count, in]."""
    expect(first % _native.TILE == 0 <= first <= first + len(into) <= matrix.rows, "rows of the weight, from a tile on")
    expect(into.shape[1] == matrix.columns and into.is_contiguous(), "rows of as many numbers as the weight has inputs")
    _native.decode(matrix.native, first, len(into), FLOATS[into.dtype], into.data_ptr(), torch.get_num_threads())
    return into


def multiplies_pairs() -> bool:
    """Whether there are products of pairs of bf16 numbers: the kernels have them, and the processor."""
    return extension.has_bf16 and bool(_native.multiplies_pairs())


def has_tiles() -> bool:
    """Whether a matrix unit (AMX) multiplies the pairs."""
    return multiplies_pairs() and bool(_native.has_tiles())


def pack_panels(weight: Tensor, pairs: bool = False) -> Tensor:
    """A weight [out, in] in panels of 16 outputs: [⌈out/16⌉, in, 16], the last padded with zeros. As `pairs`, of bf16
    and an even `in`, two inputs of an output lie side by side: [⌈out/16⌉, in/2, 32]. Rows are then rounded to bf16 when
    they are multiplied, by the processor's own instruction, which is twice as fast."""
    steps = weight.contiguous().view(torch.int32) if pairs else in_rows(weight)
    out, columns = steps.shape
    panels = torch.empty(-(-out // _native.PANEL), columns, _native.PANEL, dtype=steps.dtype)
    _native.pack_panels(
        steps.data_ptr(), out, columns, steps.stride(0), steps.itemsize, panels.data_ptr(), torch.get_num_threads()
    )
    return panels.view(weight.dtype)


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
    expect(gate[1] == up[1] and x.dtype == torch.float32, "two weights of one size, and rows in float32")
    y = torch.empty(len(x), gate[1], dtype=x.dtype)
    _multiply((gate, up), x, (y, None), gated=True)
    return y


def _multiply(weights: Sequence[Weight], x: Tensor, ys: Sequence[Tensor | None], gated: bool) -> None:
    x, (first, _, _), products = in_rows(x), weights[0], []
    columns, dtype, step = x.shape[1], first.dtype, first.shape[2]
    for (panels, out, bias), y in zip(weights, ys, strict=True):
        right = inputs(panels) == columns and panels.dtype == dtype and panels.shape[2] == step
        expect(right, "weights of one type, with inputs as the rows have")
        _expect_panels(panels, out)
        products += [out, panels.data_ptr(), _bias(bias, out, x), address(y)]
    _native.multiply_panels(
        products, gated, columns, FLOATS[dtype], in_pairs(first), x.data_ptr(), len(x), x.stride(0), FLOATS[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip


def in_pairs(panels: Tensor) -> bool:
    return panels.shape[2] != _native.PANEL


def inputs(panels: Tensor) -> int:
    """Of the weight that lies in them."""
    return panels.shape[1] * panels.shape[2] // _native.PANEL


def _expect_panels(panels: Tensor, out: int) -> None:
    panel: int = _native.PANEL
    right = panels.shape[2] in (panel, 2 * panel) and out <= len(panels) * panel and panels.is_contiguous()
    expect(right, "contiguous panels of all outputs")


def _bias(bias: Tensor | None, out: int, like: Tensor) -> int:
    if bias is None:
        return 0
    right = bias.shape == (out,) and bias.dtype == like.dtype and bias.is_contiguous()
    expect(right, "a bias for each output, of the rows' type")
    return bias.data_ptr()


def _expect_floats(*tensors: Tensor) -> None:
    expect(all(x.dtype == torch.float32 for x in tensors), "float32")


def activate(function: str, x: Tensor) -> Tensor:
    """The function of that name (native/elementwise.h) of every number, computed in float32: of x's shape and type."""
    x = x.contiguous()
    y = torch.empty_like(x)
    number = _native.FUNCTIONS[function]
    _native.activate(number, x.data_ptr(), x.numel(), FLOATS[x.dtype], y.data_ptr(), torch.get_num_threads())
    return y


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., dim] / √(mean(x²) + epsilon) ∘ weight [dim], all float32."""
    rows = in_rows(x.reshape(-1, x.shape[-1]))
    _expect_floats(x, weight)
    expect(weight.shape == x.shape[-1:] and weight.is_contiguous(), "a weight for each number of a row")
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.rms_norm(
        rows.data_ptr(), len(rows), rows.stride(0), rows.shape[1], weight.data_ptr(), epsilon, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float, group: int, gate_first: bool) -> Tensor:
    """The same of each `group` of a row's numbers: norm(x ∘ silu(gate)) ∘ weight, or norm(x) ∘ weight ∘ silu(gate).
    x and gate [..., dim], weight [dim], all float32."""
    rows, gates = (in_rows(t.reshape(-1, t.shape[-1])) for t in (x, gate))
    _expect_floats(x, gate, weight)
    right = rows.shape == gates.shape and weight.shape == x.shape[-1:] and weight.is_contiguous()
    expect(right and len(weight) % group == 0, "a gate and a weight for each number of a row, in groups")
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.gated_norm(
        rows.data_ptr(), rows.stride(0), gates.data_ptr(), gates.stride(0), *rows.shape, group, weight.data_ptr(),
        epsilon, gate_first, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def silu_gate_(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up in the place of `gate`; both contiguous, of one shape, float32."""
    _expect_floats(gate, up)
    expect(gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous(), "contiguous tensors of one shape")
    _native.silu_gate(gate.data_ptr(), up.data_ptr(), gate.numel(), torch.get_num_threads())
    return gate


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [rows, heads, dim] by cos and sin [rows, dim], whose rows are contiguous, all float32:
    x ∘ cos + (−second half of x, first half) ∘ sin, contiguous."""
    rows, heads, dim = x.shape
    x = in_rows(x)
    _expect_turns(x, cos, sin, dim)
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.rope(
        (x.data_ptr(), heads, x.stride(1), x.stride(0)), rows, dim, cos.data_ptr(), cos.stride(0), sin.data_ptr(),
        sin.stride(0), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _expect_turns(x: Tensor, cos: Tensor, sin: Tensor, dim: int) -> None:
    _expect_floats(x, cos, sin)
    right = cos.shape == sin.shape == (len(x), dim) and dim % 2 == 0 and cos.stride(1) == sin.stride(1) == 1
    expect(right, "cos and sin [rows, dim]")


class Layer:
    """A decoder layer of the usual form as native/layer.h has it. `norms` before attention, behind it, of q and of k
    are (scale, epsilon), the last two may be None; `linears` are q, k, v, o, gate, up and down, all of one type."""

    def __init__(self, heads: int, kv_heads: int, dim: int, norms: Sequence[Norm | None], linears: Sequence[Weight]):
        self.heads, self.kv_heads, self.dim, self.inner = heads, kv_heads, dim, linears[4][1]
        self.keep = norms, linears  # as long as their addresses
        first, like = linears[0][0], torch.empty(0)  # rows are float32
        self.width = inputs(first)
        for panels, out, _ in linears:
            _expect_panels(panels, out)
            expect(panels.dtype == first.dtype and in_pairs(panels) == in_pairs(first), "weights of one type")
        addresses = [(out, inputs(panels), panels.data_ptr(), _bias(bias, out, like)) for panels, out, bias in linears]
        self.native = _native.layer(
            heads, kv_heads, dim, FLOATS[first.dtype], in_pairs(first),
            [(0, 0.0) if norm is None else (norm[0].data_ptr(), norm[1]) for norm in norms], addresses,
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        """Of a copied model: by the addresses of its own weights."""
        return Layer(self.heads, self.kv_heads, self.dim, *copy.deepcopy(self.keep, memo))

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [rows, heads, dim], k and v [rows, kv_heads, dim] of x [rows, width], with cos and sin [rows, dim]."""
        rows = len(x)
        _expect_turns(x, cos, sin, self.dim)
        expect(x.shape[1] == self.width and x.is_contiguous(), "contiguous rows of the layer's width")
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
        _expect_floats(answers, x)
        right = x.shape[1] == self.width and answers.shape == (rows, self.heads, self.dim)
        expect(right and x.is_contiguous() and answers.is_contiguous(), "contiguous rows, and their answers")
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
