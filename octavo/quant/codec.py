"""Encode and decode in plain torch. This file is the specification: every kernel is tested against it.

A row `x[D]` of one token and one KV head is stored as

    y    = R((x − mu) / c)            static part: mu[D], c[D] from calibration; R a Hadamard rotation or the identity
    code = round((y − z) / s)         token part: s, z of this row; s = 1 and z = 0 in static formats

The divisions are multiplications by float32 reciprocals that are part of the specification, so kernels that use the
same numbers and the same order of sums agree bit for bit.

The token scale is one byte, an index into a logarithmic table: row e holds rows whose largest |y| is at most
`ABSMAX[e] = 2^((e + 1)/16 − 6)`, sixteen steps an octave over sixteen octaves. Eight bits: `code = round(y/s)` with
s = ABSMAX/127, to even on ties. Four bits are mid-rise, `y ≈ (code − 7.5)·s` with s = ABSMAX/8: sixteen cells of equal
width and none spent on a symmetric zero.

A y that is not a number (NaN) is encoded as 0, and counts as saturated. A NaN in x makes every y NaN that the rotation
mixes it with. Raw formats keep it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from octavo.quant.format import Codec

ABSMAX = torch.exp2((torch.arange(256, dtype=torch.float64) + 1) / 16 - 6)
LEVELS = {8: 127.0, 4: 8.0}  # |y|/s of the largest value a row can hold
TOKEN_SCALE = {bits: (ABSMAX / levels).float() for bits, levels in LEVELS.items()}
TOKEN_RECIPROCAL = {bits: (levels / ABSMAX).float() for bits, levels in LEVELS.items()}
TOKEN_LIMIT = {bits: TOKEN_SCALE[bits] * levels for bits, levels in LEVELS.items()}  # in float32, as kernels have it
MID_RISE = 7.5
FP8_LARGEST = 448.0  # of float8_e4m3fn; its last step is 32


@dataclass(frozen=True)
class Static:
    """The static part of one side of one layer: `mu` and `c`, both float32 [kv_heads, dim], c > 0."""

    mu: Tensor
    c: Tensor

    @cached_property
    def reciprocal(self) -> Tensor:
        return self.c.reciprocal()

    def to(self, device: torch.device) -> Static:
        return Static(self.mu.to(device), self.c.to(device))


@dataclass(frozen=True)
class Rows:
    """Encoded rows: `codes` [..., kv_heads, width] in the codec's stored dtype, `scales` uint8 [..., kv_heads] of
    token codecs or None, `saturated` the number of values outside what the codec can hold (0-d int64) or None."""

    codes: Tensor
    scales: Tensor | None = None
    saturated: Tensor | None = None


def rotate(x: Tensor) -> Tensor:
    """R x along the last dimension [..., dim]: an orthonormal Hadamard transform, its own inverse and transpose.

    Where `dim` is no power of two: block by block, of the largest power of two that divides it (80 → five of 16). A
    butterfly of sums, not a matrix product: each row's codes are the same bits in any company, and in any kernel.
    """
    size = x.shape[-1] & -x.shape[-1]
    y = x.unflatten(-1, (-1, size))
    half = 1
    while half < size:
        low, high = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack([low + high, low - high], -2).flatten(-3)
        half *= 2
    return (y * size**-0.5).flatten(-2)


def pack(nibbles: Tensor) -> Tensor:
    """4-bit codes [..., D] → uint8 [..., ceil(D/2)]: value d in byte d's low half, value d + ceil(D/2) in its high.

    Halves, not neighbours: unpacking is a mask and a shift with no interleave.
    """
    half = -(-nibbles.shape[-1] // 2)
    low, high = nibbles[..., :half], nibbles[..., half:]
    if high.shape[-1] < half:
        high = torch.nn.functional.pad(high, (0, 1))
    return low | (high << 4)


def unpack(codes: Tensor, dim: int) -> Tensor:
    """uint8 [..., ceil(dim/2)] → 4-bit codes [..., dim]."""
    return torch.cat([codes & 15, codes >> 4], -1)[..., :dim]


def encode(x: Tensor, codec: Codec, static: Static | None = None, scales: Tensor | None = None) -> Rows:
    """Encode rows `x` [..., kv_heads, dim] of any float dtype. `scales` [..., kv_heads] are the indices of the rows'
    token scales where they are known; without them each row has the smallest that holds its largest value.

    Saturation is counted per value. Static: |y| > 128.5, which is more than one step beyond the calibrated range (its
    own end is y = ±127.5). Float: |y| > 464, half a step beyond the largest. Token: beyond the last entry of the
    scale table. All: what is not a number.
    """
    if codec.is_raw:
        return Rows(x.to(getattr(torch, codec.dtype)))
    y = x.float()
    if static is not None:
        y = (y - static.mu) * static.reciprocal
    if codec.rotated:
        y = rotate(y)
    wrong = y.isnan()
    y = y.masked_fill(wrong, 0)
    if codec.kind == "float":
        bits = y.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return Rows(bits, None, (wrong | (y.abs() > FP8_LARGEST + 16)).sum())
    if not codec.has_token_scale:
        return Rows(y.round().clamp(-128, 127).to(torch.int8), None, (wrong | (y.abs() > 128.5)).sum())
    levels = LEVELS[codec.bits]
    if scales is None:
        scales = torch.searchsorted(TOKEN_LIMIT[codec.bits].to(y.device), y.abs().amax(-1)).clamp_(max=255)
    y = y * TOKEN_RECIPROCAL[codec.bits].to(y.device)[scales.long()][..., None]
    saturated = (wrong | (y.abs() > levels + 0.5)).sum()
    if codec.bits == 4:
        codes = pack((y.floor() + 8).clamp_(0, 15).to(torch.uint8))
    else:
        codes = y.round().clamp_(-128, 127).to(torch.int8)
    return Rows(codes, scales.to(torch.uint8), saturated)


def encode_decoded(x: Tensor, codec: Codec, static: Static | None = None) -> Rows:
    """Encode rows that may have been codes before: those get the same codes and scales again.

    A decoded row does not say which scale it had: its largest value is the middle of a cell, or by rounding beyond the
    scale's range, or less than the range of the scale below. Of the scale that `encode` chooses, the one below and two
    above this takes the one that gives the row back most nearly, which for decoded rows is theirs.
    """
    best = encode(x, codec, static)
    if best.scales is None:
        return best
    codes, scales, error = best.codes, best.scales, _error(x, best, codec, static)
    for step in (-1, 1, 2):
        other = encode(x, codec, static, (best.scales.int() + step).clamp(0, 255))
        other_error = _error(x, other, codec, static)
        nearer = other_error < error
        assert other.scales is not None
        codes = torch.where(nearer[..., None], other.codes, codes)
        scales, error = torch.where(nearer, other.scales, scales), torch.minimum(other_error, error)
    return Rows(codes, scales)


def _error(x: Tensor, rows: Rows, codec: Codec, static: Static | None) -> Tensor:
    """Sum of squares of what encoding changed in each row, in units of the static part: [..., kv_heads]."""
    change = decode(rows, codec, x.shape[-1], static) - x.float()
    return (change if static is None else change * static.reciprocal).square().sum(-1)


def centered(codes: Tensor, codec: Codec, dim: int) -> Tensor:
    """The codes as float32 numbers that only a scale separates from y: [..., dim]. Attention computes on these."""
    if codec.bits == 4:
        return unpack(codes, dim).float() - MID_RISE
    return (codes.view(torch.float8_e4m3fn) if codec.kind == "float" else codes).float()


def token_scale(scales: Tensor, codec: Codec) -> Tensor:
    """Float32 scale s of each row from its one-byte index, the same shape."""
    return TOKEN_SCALE[codec.bits].to(scales.device)[scales.int()]


def decode(rows: Rows, codec: Codec, dim: int, static: Static | None = None) -> Tensor:
    """The float32 values [..., kv_heads, dim] that the rows stand for. Attention never calls this; tests do."""
    y = centered(rows.codes, codec, dim)
    if rows.scales is not None:
        y = y * token_scale(rows.scales, codec)[..., None]
    if codec.rotated:
        y = rotate(y)
    return y if static is None else y * static.c + static.mu
