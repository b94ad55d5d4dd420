"""Encode and decode against the formulas of the design, written again in numpy.

`spec_*` repeat the specification in float32, where codes must agree bit for bit. Everything else is float64.
"""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from octavo.quant.codec import Rows, Static, centered, decode, encode, encode_decoded, pack, rotate, token_scale, unpack
from octavo.quant.format import CODECS, Codec, Granularity
from octavo.quant.statistics import float_static, range_static

Array = NDArray[np.floating]

DIMS = [64, 80, 96, 128, 256]
ODD_DIMS = [1, 3, 7, 33, 65]
INT8 = CODECS["int8"]
TOKEN = CODECS["int8-token-unrotated"]
INT4 = CODECS["int4-token-unrotated"]
TOKEN_CODECS = ["int8-token-unrotated", "int8-token", "int4-token", "int4-token-unrotated"]
LEVELS = {8: 127, 4: 8}
ABSMAX = 2.0 ** ((np.arange(256) + 1) / 16 - 6)  # of the largest value that scale e is for
STEP = 2.0 ** (1 / 16)
UNIT = Static(mu=torch.zeros(1, 1), c=torch.ones(1, 1))  # y = x
quick = settings(max_examples=60, deadline=None)


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def ranges(x: Array, granularity: Granularity) -> tuple[Array, Array]:
    """Min and max [kv_heads, dim] of rows [tokens, kv_heads, dim] in float64."""
    x = x.astype(np.float64)
    axes = {"tensor": (0, 1, 2), "head": (0, 2), "channel": (0,)}[granularity]
    low, high = x.min(axes, keepdims=True)[0], x.max(axes, keepdims=True)[0]
    return np.broadcast_to(low, x.shape[1:]), np.broadcast_to(high, x.shape[1:])


def calibrated(x: Array, granularity: Granularity = "channel", headroom: float = 1.0) -> Static:
    return range_static(torch.from_numpy(x).amin(0), torch.from_numpy(x).amax(0), granularity, headroom)


def hadamard(dim: int) -> torch.Tensor:
    """The matrix that `rotate` applies."""
    return rotate(torch.eye(dim))


def numpy_hadamard(dim: int) -> Array:
    """Sylvester's matrix by its closed form, (−1)^popcount(i & j), along the diagonal."""
    size = math.gcd(dim, 1 << 30)
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.kron(np.eye(dim // size), np.array(signs) / math.sqrt(size))


def spec_static(x: Array, static: Static) -> Array:
    """y in float32, by the reciprocal that the specification prescribes."""
    return (x - static.mu.numpy()) * (np.float32(1) / static.c.numpy())


def spec_token(y: Array, bits: int) -> tuple[Array, Array]:
    """(y/s in float32, scale indices) of rows y."""
    scales = (ABSMAX / LEVELS[bits]).astype(np.float32)
    reciprocals = (LEVELS[bits] / ABSMAX).astype(np.float32)
    limits = scales * np.float32(LEVELS[bits])
    absmax = np.abs(y).max(-1)
    index = np.minimum((limits < absmax[..., None]).sum(-1), 255)
    return y * reciprocals[index][..., None], index


def spec_pack(nibbles: Array) -> Array:
    half = math.ceil(nibbles.shape[-1] / 2)
    padded = np.zeros((*nibbles.shape[:-1], 2 * half), dtype=np.uint8)
    padded[..., : nibbles.shape[-1]] = nibbles
    return padded[..., :half] + 16 * padded[..., half:]


def encoded(x: Array | list[list[float]], codec: Codec, static: Static | None = None) -> Rows:
    """Rows given as [kv_heads, dim] or [tokens, kv_heads, dim]."""
    return encode(torch.as_tensor(np.asarray(x, dtype=np.float32)), codec, static)


def codes_of(values: list[float], codec: Codec = INT8, static: Static | None = UNIT) -> list[int]:
    codes = encoded([values], codec, static).codes
    return (unpack(codes, len(values)) if codec.bits == 4 else codes)[0].tolist()


def saturated(values: list[float], codec: Codec = INT8, static: Static | None = UNIT) -> int:
    count = encoded([values], codec, static).saturated
    assert count is not None
    assert count.shape == ()
    assert count.dtype == torch.int64
    return int(count)


def assert_codes(codes: Tensor, exact: Array, slack: float = 1e-4) -> None:
    """Codes are round-half-even of the float64 values `exact`, where these are not within rounding of a tie."""
    far = np.abs(exact - np.floor(exact) - 0.5) > slack
    assert far.mean() > 0.99
    np.testing.assert_array_equal(codes.numpy()[far], np.clip(np.rint(exact), -128, 127)[far])


# The static part


@pytest.mark.parametrize("headroom", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_static_part_is_the_midpoint_and_the_widened_range(granularity: Granularity, headroom: float) -> None:
    x = gaussian(200, 3, 16, scale=5) + np.arange(48, dtype=np.float32).reshape(3, 16)
    low, high = ranges(x, granularity)
    static = calibrated(x, granularity, headroom)
    assert static.mu.shape == static.c.shape == (3, 16)
    assert static.mu.dtype == static.c.dtype == torch.float32
    np.testing.assert_allclose(static.mu.numpy(), (low + high) / 2, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(static.c.numpy(), headroom * (high - low) / 255, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_finer_granularity_takes_its_range_over_fewer_values(granularity: Granularity) -> None:
    x = gaussian(50, 3, 16) * np.linspace(0.5, 4, 48, dtype=np.float32).reshape(3, 16)
    distinct = {"tensor": 1, "head": 3, "channel": 48}[granularity]
    static = calibrated(x, granularity)
    assert len(static.c.unique()) == len(static.mu.unique()) == distinct


@pytest.mark.parametrize("dim", DIMS)
def test_the_original_recipe_is_tensor_granularity_without_headroom(dim: int) -> None:
    f = gaussian(128, 2, dim, scale=3) - 1
    low, high = float(f.min()), float(f.max())
    zp, scale = (low + high) / 2, (high - low) / 255
    static = calibrated(f, "tensor", 1.0)
    rows = encoded(f, INT8, static)
    assert_codes(rows.codes, (f.astype(np.float64) - zp) / scale)
    restored = decode(rows, INT8, dim, static).numpy()
    np.testing.assert_allclose(restored, rows.codes.numpy() * scale + zp, rtol=1e-5, atol=1e-5)
    assert np.abs(restored - f).max() <= scale / 2 * (1 + 1e-4)
    assert rows.codes.min() <= -127  # 127.5 steps down, give or take float32's rounding
    assert rows.codes.max() == 127  # 127.5 steps up, and round(127.5) = 128 does not fit
    assert rows.saturated == 0


@pytest.mark.parametrize("dim", [*DIMS, *ODD_DIMS])
@pytest.mark.parametrize(("granularity", "headroom"), [("tensor", 1.0), ("head", 1.2), ("channel", 1.5)])
def test_static_codes_are_the_formula(dim: int, granularity: Granularity, headroom: float) -> None:
    x = gaussian(90, 2, dim, scale=2) + gaussian(2, dim, seed=1, scale=10)
    static = calibrated(x, granularity, headroom)
    other = gaussian(70, 2, dim, seed=2, scale=4) + gaussian(2, dim, seed=1, scale=10)
    low, high = ranges(x, granularity)
    rows = encoded(other, INT8, static)
    assert rows.scales is None
    assert rows.codes.dtype == torch.int8
    assert rows.codes.shape == other.shape
    # (x − mu) loses up to half a unit in x's last place: a few 1e-5 of a step here.
    assert_codes(rows.codes, (other - (low + high) / 2) / (headroom * (high - low) / 255), slack=1e-3)
    np.testing.assert_array_equal(rows.codes.numpy(), np.clip(np.rint(spec_static(other, static)), -128, 127))


def test_the_static_division_is_a_product_with_a_float32_reciprocal() -> None:
    """Where a value lies on a tie, dividing gives other codes than multiplying. Kernels must agree to the bit."""
    c = np.linspace(0.011, 0.9, 400, dtype=np.float32)
    mu = np.linspace(-3, 3, 400, dtype=np.float32)
    static = Static(torch.from_numpy(mu)[None], torch.from_numpy(c)[None])
    x = ((np.arange(-100, 100, dtype=np.float32)[:, None] + np.float32(0.5)) * c + mu)[:, None]
    expected = np.rint(spec_static(x, static))
    assert (np.rint((x - mu) / c) != expected).any()
    assert (np.rint(x * (1 / c) - mu * (1 / c)) != expected).any()
    np.testing.assert_array_equal(encoded(x, INT8, static).codes.numpy(), expected)


@pytest.mark.parametrize("codec", [TOKEN, INT4], ids=str)
def test_the_token_division_is_a_product_with_a_float32_reciprocal(codec: Codec) -> None:
    """Rows of every scale whose values lie on the borders between codes."""
    levels = LEVELS[codec.bits]
    scales = (ABSMAX / levels).astype(np.float32)[:, None]
    borders = np.arange(1 - levels, levels, dtype=np.float32) + np.float32(0.5 if codec.bits == 8 else 0)
    x = np.concatenate([scales * np.float32(levels), scales * borders], axis=1)[:, None]
    scaled, index = spec_token(x, codec.bits)
    np.testing.assert_array_equal(index[:, 0], np.arange(256))
    to_code = np.rint if codec.bits == 8 else np.floor
    assert (to_code(x / scales[:, None]) != to_code(scaled)).any()
    rows = encoded(x, codec)
    codes = rows.codes if codec.bits == 8 else unpack(rows.codes, x.shape[-1])
    expected = np.clip(np.rint(scaled), -128, 127) if codec.bits == 8 else np.clip(np.floor(scaled) + 8, 0, 15)
    np.testing.assert_array_equal(codes.numpy(), expected)


def test_static_codes_round_half_to_even() -> None:
    assert codes_of([0.5, 1.5, 2.5, 3.5, 100.5, 101.5]) == [0, 2, 2, 4, 100, 102]
    assert codes_of([-0.5, -1.5, -2.5, -3.5, -100.5, -101.5]) == [0, -2, -2, -4, -100, -102]
    below, above = np.nextafter(np.float32(0.5), np.float32(0)), np.nextafter(np.float32(0.5), np.float32(1))
    assert codes_of([float(below), float(above), float(-below), float(-above)]) == [0, 1, 0, -1]


def test_static_codes_clamp_at_the_ends_of_a_byte() -> None:
    assert codes_of([126.49, 126.5, 126.51, 127.0, 127.49, 127.5, 128.0, 1e4, 3e38]) == [126, 126, 127, *[127] * 6]
    assert codes_of([-127.0, -127.49, -127.5, -128.0, -128.5, -129.0, -1e4, -3e38]) == [-127, -127, *[-128] * 6]


def test_static_saturation_counts_exactly_what_lies_a_step_beyond_the_range() -> None:
    beyond = float(np.nextafter(np.float32(128.5), np.float32(129)))
    assert saturated([127.5, -127.5, 128.0, -128.0, 128.5, -128.5, 0.0]) == 0
    assert saturated([beyond, -beyond, 128.5, -128.5, 200.0, -1e9]) == 4
    x = gaussian(40, 2, 64, scale=80)
    assert int(encoded(x, INT8, UNIT).saturated) == (np.abs(x) > 128.5).sum() > 0


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if not codec.is_raw])
def test_what_is_not_a_number_is_stored_as_0_and_counts_as_saturated(name: str) -> None:
    """In each value that the rotation mixes with it, of one row of two."""
    codec = CODECS[name]
    rows = gaussian(2, 1, 64)
    wrong, zero = rows.copy(), rows.copy()
    wrong[1, 0, 5], zero[1, 0, slice(None) if codec.rotated else 5] = np.nan, 0
    static = None if codec.has_token_scale else Static(mu=torch.zeros(1, 64), c=torch.ones(1, 64) / 8)
    found, expected = encoded(wrong, codec, static), encoded(zero, codec, static)
    assert torch.equal(found.codes, expected.codes)
    assert found.scales is None or torch.equal(found.scales, expected.scales)
    assert int(found.saturated) - int(expected.saturated) == (64 if codec.rotated else 1)


def test_saturation_is_counted_in_calibrated_steps() -> None:
    x = gaussian(100, 2, 32, scale=0.01) + 7
    static = calibrated(x, "channel")
    low, high = ranges(x, "channel")
    one_step = (high - low) / 255
    inside, outside = high + 0.9 * one_step, high + 1.1 * one_step
    assert encoded(inside[None], INT8, static).saturated == 0
    assert encoded(outside[None], INT8, static).saturated == 64
    assert encoded(2 * low[None] - outside[None], INT8, static).saturated == 64
    widened = calibrated(x, "channel", 1.5)
    assert encoded(outside[None], INT8, widened).saturated == 0


def test_a_value_beyond_the_calibrated_range_decodes_to_its_end() -> None:
    x = gaussian(100, 1, 8) * 3 + 5
    static = calibrated(x)
    low, high = (side.astype(np.float32) for side in ranges(x, "channel"))
    up = decode(encoded(high[None] + 100, INT8, static), INT8, 8, static).numpy()[0]
    down = decode(encoded(low[None] - 100, INT8, static), INT8, 8, static).numpy()[0]
    np.testing.assert_allclose(up, high - static.c.numpy() / 2, rtol=1e-5)  # 127 of 127.5 steps
    np.testing.assert_allclose(down, low - static.c.numpy() / 2, rtol=1e-5)  # 128 of them


def test_headroom_widens_the_range_about_its_midpoint() -> None:
    static = range_static(torch.tensor([[-2.0, 0.0]]), torch.tensor([[6.0, 4.0]]), "channel", 2.0)
    assert static.mu.tolist() == [[2.0, 2.0]]
    assert encoded([[2 + 7.9, 2 + 3.95]], INT8, static).saturated == 0  # twice 4, twice 2
    assert encoded([[2 - 7.9, 2 - 3.95]], INT8, static).saturated == 0
    assert encoded([[2 + 8.1, 2 + 4.05]], INT8, static).saturated == 2


@pytest.mark.parametrize("constant", [0.0, 5.0, -3.25, 1e-20, 1e30])
def test_a_constant_channel_decodes_to_its_constant(constant: float) -> None:
    low = torch.tensor([[constant, -1.0]])
    static = range_static(low, torch.tensor([[constant, 1.0]]), "channel", 1.5)
    assert torch.isfinite(static.reciprocal).all()
    assert static.c[0, 0] == 1
    x = torch.tensor([[[constant, 0.3]]])
    rows = encode(x, INT8, static)
    assert rows.codes[0, 0, 0] == 0
    assert rows.saturated == 0
    restored = decode(rows, INT8, 2, static)
    assert restored[0, 0, 0] == x[0, 0, 0]
    assert restored[0, 0, 1] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_an_all_zero_layer_decodes_to_zeros(granularity: Granularity) -> None:
    zeros = torch.zeros(2, 4)
    static = range_static(zeros, zeros, granularity, 1.5)
    rows = encode(torch.zeros(5, 2, 4), INT8, static)
    assert not decode(rows, INT8, 4, static).any()
    assert rows.saturated == 0


@pytest.mark.parametrize("span", [1e-38, 1e-36, 1e-33, 1e-28, 1e-25, 1e20, 1e37])
def test_a_range_of_any_width_stays_finite(span: float) -> None:
    static = range_static(torch.tensor([[-span]]), torch.tensor([[span]]), "channel", 1.5)
    assert torch.isfinite(static.c).all()
    assert torch.isfinite(static.reciprocal).all()
    assert (static.c > 0).all()
    x = torch.tensor([[[span]], [[-span / 2]], [[0.0]]])
    restored = decode(encode(x, INT8, static), INT8, 1, static)
    torch.testing.assert_close(restored, x, rtol=0, atol=1e-30 + span / 100)


def test_ranges_that_are_all_negative_use_every_code() -> None:
    x = np.linspace(-9, -5, 1000, dtype=np.float32)[:, None, None]
    static = calibrated(x)
    assert static.mu.item() == -7
    rows = encoded(x, INT8, static)
    assert len(rows.codes.unique()) >= 255
    assert (rows.codes[1:] >= rows.codes[:-1]).all()
    assert np.abs(decode(rows, INT8, 1, static).numpy() - x).max() <= 4 / 255 / 2 * (1 + 1e-3)


def test_head_and_channel_have_their_own_static_part() -> None:
    static = Static(mu=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), c=torch.tensor([[0.5, 0.25], [2.0, 4.0]]))
    rows = encoded([[2.0, 4.0], [-3.0, 20.0]], INT8, static)
    assert rows.codes.tolist() == [[2, 8], [-3, 4]]
    assert decode(rows, INT8, 2, static).tolist() == [[2.0, 4.0], [-3.0, 20.0]]


# The token part


@pytest.mark.parametrize("codec", [TOKEN, INT4], ids=str)
def test_the_scale_is_the_smallest_that_holds_the_row(codec: Codec) -> None:
    """Each of the 256 limits, to the last bit: the limit itself takes that scale, the next float the next one."""
    levels = LEVELS[codec.bits]
    limits = (ABSMAX / levels).astype(np.float32) * np.float32(levels)
    np.testing.assert_allclose(limits, ABSMAX, rtol=2e-7)
    above = np.nextafter(limits, np.float32(np.inf))
    for sign in (1, -1):
        at_limit = encoded(np.stack([sign * limits, 0 * limits], -1)[:, None], codec)
        assert at_limit.scales is not None
        assert at_limit.scales.dtype == torch.uint8
        assert at_limit.scales.shape == (256, 1)
        assert at_limit.scales[:, 0].tolist() == list(range(256))
        beyond = encoded(np.stack([0 * above, sign * above], -1)[:, None], codec)
        assert beyond.scales is not None
        assert beyond.scales[:, 0].tolist() == [*range(1, 256), 255]
        assert at_limit.saturated == beyond.saturated == 0


def test_the_scale_table_spans_sixteen_octaves_in_sixteenths() -> None:
    table = token_scale(torch.arange(256, dtype=torch.uint8), TOKEN).double().numpy() * 127
    np.testing.assert_allclose(table[1:] / table[:-1], STEP, rtol=1e-6)
    assert table[15] == pytest.approx(2**-5, rel=1e-6)
    assert table[95] == pytest.approx(1, rel=1e-6)
    assert table[255] == pytest.approx(2**10, rel=1e-6)
    eighths = token_scale(torch.arange(256, dtype=torch.uint8), INT4).double().numpy() * 8
    np.testing.assert_allclose(eighths, table, rtol=1e-6)


@pytest.mark.parametrize("dim", [*DIMS, *ODD_DIMS])
def test_eight_bit_token_rows_are_the_formula(dim: int) -> None:
    x = gaussian(60, 3, dim) * np.exp2(gaussian(60, 3, 1, seed=1, scale=3)).astype(np.float32)
    rows = encoded(x, TOKEN)
    assert rows.scales is not None
    scaled, index = spec_token(x, 8)
    np.testing.assert_array_equal(rows.scales.numpy(), index)
    np.testing.assert_array_equal(rows.codes.numpy(), np.clip(np.rint(scaled), -128, 127))
    assert_codes(rows.codes, x.astype(np.float64) / (ABSMAX[index] / 127)[..., None])
    assert rows.codes.dtype == torch.int8


@pytest.mark.parametrize("dim", [*DIMS, *ODD_DIMS])
def test_four_bit_token_rows_are_sixteen_cells_two_a_byte(dim: int) -> None:
    x = gaussian(60, 3, dim) * np.exp2(gaussian(60, 3, 1, seed=1, scale=3)).astype(np.float32)
    rows = encoded(x, INT4)
    assert rows.scales is not None
    scaled, index = spec_token(x, 4)
    nibbles = np.clip(np.floor(scaled) + 8, 0, 15).astype(np.uint8)
    assert rows.codes.dtype == torch.uint8
    np.testing.assert_array_equal(rows.scales.numpy(), index)
    np.testing.assert_array_equal(rows.codes.numpy(), spec_pack(nibbles))
    exact = (nibbles.astype(np.float64) - 7.5) * (ABSMAX[index] / 8)[..., None]
    np.testing.assert_allclose(decode(rows, INT4, dim).numpy(), exact, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("codec", [TOKEN, INT4], ids=str)
def test_a_static_part_under_a_token_codec_comes_first(codec: Codec, granularity: Granularity) -> None:
    x = gaussian(50, 2, 20) * np.linspace(1, 30, 20, dtype=np.float32) + 100
    static = calibrated(x, granularity, 1.5)
    rows = encoded(x, codec, static)
    assert rows.scales is not None
    scaled, index = spec_token(spec_static(x, static), codec.bits)
    np.testing.assert_array_equal(rows.scales.numpy(), index)
    codes = np.clip(np.rint(scaled), -128, 127) if codec.bits == 8 else spec_pack(np.clip(np.floor(scaled) + 8, 0, 15))
    np.testing.assert_array_equal(rows.codes.numpy(), codes)
    centre = rows.codes.numpy() if codec.bits == 8 else np.clip(np.floor(scaled) + 8, 0, 15) - 7.5
    y = centre.astype(np.float64) * (ABSMAX[index] / LEVELS[codec.bits])[..., None]
    np.testing.assert_allclose(
        decode(rows, codec, 20, static).numpy(), y * static.c.numpy() + static.mu.numpy(), rtol=1e-5
    )


@pytest.mark.parametrize("codec", [TOKEN, INT4], ids=str)
def test_four_bit_cells_and_eight_bit_ties_at_a_scale_of_a_power_of_two(codec: Codec) -> None:
    """A row whose largest value is 1 has the scale 1/8 exactly in 4 bits, 1/127 in 8."""
    if codec.bits == 4:
        values = [1.0, -1.0, 0.99, -0.99, 0.875, 0.874, 0.125, 0.124, 0.001, 0.0, -0.0, -0.001, -0.125, -0.126, -0.875]
        assert codes_of(values, INT4, None) == [15, 0, 15, 0, 15, 14, 9, 8, 8, 8, 8, 7, 7, 6, 1]
    else:
        values = [1.0, -1.0, 0.5 / 127, 1.5 / 127, 2.4999 / 127, 2.5001 / 127, -2.5001 / 127, 0.0]
        assert codes_of(values, TOKEN, None) == [127, -127, 0, 2, 2, 3, -3, 0]


def test_four_bit_codes_are_packed_by_halves() -> None:
    nibbles = torch.tensor([[1, 2, 3, 4, 5, 6], [15, 0, 8, 7, 14, 9]], dtype=torch.uint8)
    assert pack(nibbles).tolist() == [[0x41, 0x52, 0x63], [0x7F, 0xE0, 0x98]]
    assert pack(nibbles[:, :5]).tolist() == [[0x41, 0x52, 0x03], [0x7F, 0xE0, 0x08]]
    assert pack(nibbles[:, :1]).tolist() == [[0x01], [0x0F]]


def test_a_four_bit_row_has_exactly_these_bytes() -> None:
    rows = encoded([[1.0, -1.0, 0.0, 0.3, -0.3]], INT4)  # cells 15 0 8 | 10 5
    assert rows.codes.tolist() == [[0xAF, 0x50, 0x08]]
    assert rows.scales is not None
    assert rows.scales.tolist() == [95]
    np.testing.assert_allclose(decode(rows, INT4, 5).numpy() * 16, [[15, -15, 1, 5, -5]])


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 3), st.integers(1, 70)), elements=st.integers(0, 15)))
@quick
def test_packing_round_trips_in_half_the_bytes(nibbles: NDArray[np.uint8]) -> None:
    codes = torch.from_numpy(nibbles)
    packed = pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(nibbles), math.ceil(nibbles.shape[1] / 2))
    np.testing.assert_array_equal(packed.numpy(), spec_pack(nibbles))
    torch.testing.assert_close(unpack(packed, nibbles.shape[1]), codes, rtol=0, atol=0)


def test_a_row_beyond_the_scale_table_saturates_and_is_counted() -> None:
    values = [1024.0, 1028.0, 1028.1, -1028.1, 5000.0, 0.0]  # 127.5 steps are 1028.03
    assert saturated(values, TOKEN, None) == 3
    rows = encoded([values], TOKEN)
    assert rows.scales is not None
    assert rows.scales.tolist() == [255]
    assert rows.codes.tolist() == [[127, 127, 127, -128, 127, 0]]
    values = [1024.0, -1024.0, 1087.9, 1088.1, -1088.1, 1e9]  # 8.5 steps are 1088
    assert saturated(values, INT4, None) == 3
    assert codes_of(values, INT4, None) == [15, 0, 15, 15, 0, 15]


def test_saturation_of_one_row_does_not_touch_another() -> None:
    x = gaussian(4, 2, 16)
    wild = x.copy()
    wild[1, 0] *= 1e6
    for name in TOKEN_CODECS:
        tame, mixed = encoded(x, CODECS[name]), encoded(wild, CODECS[name])
        same = np.ones((4, 2), dtype=bool)
        same[1, 0] = False
        np.testing.assert_array_equal(tame.codes.numpy()[same], mixed.codes.numpy()[same])
        assert tame.saturated == 0
        assert mixed.saturated is not None
        assert 0 < int(mixed.saturated) <= 16


@pytest.mark.parametrize("name", TOKEN_CODECS)
@pytest.mark.parametrize("dim", [*DIMS, *ODD_DIMS])
def test_a_zero_row_decodes_to_almost_nothing(name: str, dim: int) -> None:
    codec = CODECS[name]
    rows = encode(torch.zeros(3, 2, dim), codec)
    assert rows.scales is not None
    assert not rows.scales.any()
    restored = decode(rows, codec, dim).double()
    if codec.bits == 8:
        assert not restored.any()
    else:  # mid-rise has no zero: half a step of the smallest scale, in every (rotated) channel
        assert restored.norm(dim=-1).max() <= math.sqrt(dim) * 2**-6 * STEP / 16 * (1 + 1e-5)


# The rotation


@pytest.mark.parametrize("dim", [*DIMS, *ODD_DIMS, 2, 48, 112, 576])
def test_the_rotation_is_sylvesters_matrix_in_blocks(dim: int) -> None:
    matrix = hadamard(dim)
    assert matrix.dtype == torch.float32
    assert matrix.shape == (dim, dim)
    np.testing.assert_allclose(matrix.numpy(), numpy_hadamard(dim), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [*DIMS, *ODD_DIMS, 48])
def test_the_rotation_is_orthonormal_symmetric_and_its_own_inverse(dim: int) -> None:
    matrix = hadamard(dim).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=0)
    x = torch.from_numpy(gaussian(5, 2, dim))
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "block"), [(64, 64), (80, 16), (96, 32), (48, 16), (40, 8), (6, 2), (7, 1), (33, 1)])
def test_a_block_is_the_largest_power_of_two_that_divides_the_dim(dim: int, block: int) -> None:
    expected = torch.block_diag(*[torch.ones(block, block)] * (dim // block)) / math.sqrt(block)
    torch.testing.assert_close(hadamard(dim).abs(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [*DIMS, 48, 7])
def test_the_rotation_leaves_dot_products(dim: int) -> None:
    q, k = torch.from_numpy(gaussian(6, dim)), torch.from_numpy(gaussian(9, dim, seed=1))
    torch.testing.assert_close(rotate(q) @ rotate(k).T, q @ k.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["int8-token", "int4-token"])
@pytest.mark.parametrize("calibrate", [False, True], ids=["bare", "calibrated"])
def test_rotated_codes_are_the_formula_within_rounding(name: str, dim: int, calibrate: bool) -> None:
    codec, x = CODECS[name], gaussian(40, 2, dim, scale=3) + 2
    static = calibrated(x, "channel", 1.5) if calibrate else None
    rows = encoded(x, codec, static)
    y = x.astype(np.float64)
    if static is not None:
        y = (y - static.mu.double().numpy()) / static.c.double().numpy()
    y = y @ numpy_hadamard(dim)
    assert rows.scales is not None
    np.testing.assert_array_equal(rows.scales.numpy(), (np.abs(y).max(-1, keepdims=True) > ABSMAX).sum(-1))
    step = (ABSMAX[rows.scales.int().numpy()] / LEVELS[codec.bits])[..., None]
    if codec.bits == 8:
        assert_codes(rows.codes, y / step)
    else:
        cells = y / step
        far = np.abs(cells - np.rint(cells)) > 1e-4
        nibbles = unpack(rows.codes, dim).numpy()
        np.testing.assert_array_equal(nibbles[far], np.clip(np.floor(cells) + 8, 0, 15)[far])
    restored = centered(rows.codes, codec, dim).double().numpy() * step @ numpy_hadamard(dim)
    if static is not None:
        restored = restored * static.c.double().numpy() + static.mu.double().numpy()
    np.testing.assert_allclose(decode(rows, codec, dim, static).numpy(), restored, rtol=1e-4, atol=1e-4)


def test_rotation_spreads_an_outlier_channel() -> None:
    x = gaussian(100, 1, 128)
    x[..., 17] = 300
    error = {
        name: np.abs(decode(encoded(x, CODECS[name]), CODECS[name], 128).numpy() - x)[..., :17].mean()
        for name in ("int4-token", "int4-token-unrotated")
    }
    assert error["int4-token"] < error["int4-token-unrotated"] / 5


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("name", TOKEN_CODECS)
@given(seed=st.integers(0, 2**31), dim=st.sampled_from([1, 7, 64, 80]), exponent=st.floats(-14, 14))
@quick
def test_rows_that_were_codes_become_the_same_codes(
    name: str, calibrate: bool, seed: int, dim: int, exponent: float
) -> None:
    """Scales too; and what other rows become stays as it is from then on."""
    codec, x = CODECS[name], gaussian(20, 2, dim, seed=seed, scale=2.0**exponent)
    x[:3] *= 0.01  # below the scale table
    rows = torch.from_numpy(x)
    static = calibrated(x, headroom=4.0) if calibrate else None
    for coded in (encode(rows, codec, static), encode_decoded(rows, codec, static)):
        again = encode_decoded(decode(coded, codec, dim, static), codec, static)
        assert again.scales is not None
        assert coded.scales is not None
        assert torch.equal(again.codes, coded.codes)
        assert torch.equal(again.scales, coded.scales)


# Every format


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_has_the_codes_of_its_float32_value(name: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(gaussian(30, 2, 24, scale=3)).to(dtype)
    static = calibrated(x.float().numpy(), "channel") if name == "int8" else None
    rows, expected = encode(x, CODECS[name], static), encode(x.float(), CODECS[name], static)
    assert torch.equal(rows.codes, expected.codes)
    assert (rows.scales is None) == (expected.scales is None)
    if rows.scales is not None and expected.scales is not None:
        assert torch.equal(rows.scales, expected.scales)
    restored = decode(rows, CODECS[name], 24, static)
    assert restored.dtype == torch.float32
    assert torch.isfinite(restored).all()


@pytest.mark.parametrize("name", CODECS)
def test_codes_have_the_dtype_and_bytes_that_the_format_promises(name: str) -> None:
    codec = CODECS[name]
    for dim in (*DIMS, *ODD_DIMS):
        rows = encode(torch.from_numpy(gaussian(4, 2, dim)), codec, UNIT if name == "int8" else None)
        assert rows.codes.dtype == getattr(torch, codec.dtype)
        assert rows.codes.nbytes == 8 * codec.code_bytes(dim)
        assert (rows.scales.nbytes if rows.scales is not None else 0) == 8 * codec.has_token_scale
        assert decode(rows, codec, dim, UNIT if name == "int8" else None).shape == (4, 2, dim)


@pytest.mark.parametrize("name", CODECS)
def test_no_rows_are_no_rows(name: str) -> None:
    codec = CODECS[name]
    rows = encode(torch.empty(0, 2, 6), codec, UNIT if name == "int8" else None)
    assert rows.codes.shape[:2] == (0, 2)
    assert rows.saturated is None or rows.saturated == 0
    assert decode(rows, codec, 6).shape == (0, 2, 6)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_raw_rows_are_a_cast_that_a_static_part_does_not_touch(name: str) -> None:
    x = torch.from_numpy(gaussian(5, 2, 10, scale=50))
    rows = encode(x, CODECS[name])
    assert rows.scales is None
    assert rows.saturated is None
    assert torch.equal(rows.codes, x.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]))
    assert torch.equal(decode(rows, CODECS[name], 10), rows.codes.float())
    assert torch.equal(encode(x, CODECS[name], Static(x[0], x[0].abs())).codes, rows.codes)


def test_encoding_leaves_its_input_alone() -> None:
    for name, codec in CODECS.items():
        x = torch.from_numpy(gaussian(5, 2, 10))
        before = x.clone()
        rows = encode(x, codec, UNIT if name == "int8" else None)
        codes = rows.codes.clone()
        decode(rows, codec, 10)
        assert torch.equal(x, before)
        assert torch.equal(rows.codes, codes)


@pytest.mark.parametrize("name", CODECS)
def test_leading_dimensions_are_free_and_strides_do_not_matter(name: str) -> None:
    codec, static = CODECS[name], UNIT if name == "int8" else None
    x = torch.from_numpy(gaussian(2, 3, 4, 16))
    whole = encode(x, codec, static)
    torch.testing.assert_close(whole.codes[1], encode(x[1], codec, static).codes, rtol=0, atol=0)
    strided = encode(x.transpose(0, 1).contiguous().transpose(0, 1), codec, static)
    assert torch.equal(strided.codes, whole.codes)


rows_of_floats = st.integers(1, 40).flatmap(
    lambda dim: hnp.arrays(np.float32, (3, 1, dim), elements=st.floats(-1000, 1000, width=32))
)


@given(rows_of_floats, st.sampled_from([1.0, 1.5, 3.0]), st.sampled_from(["tensor", "head", "channel"]))
@quick
def test_static_error_is_at_most_half_a_step_within_the_range(x: Array, headroom: float, granularity: str) -> None:
    static = calibrated(x, granularity, headroom)  # type: ignore[arg-type]
    rows = encoded(x, INT8, static)
    assert rows.saturated == 0
    low, high = ranges(x, granularity)  # type: ignore[arg-type]
    step = headroom * (high - low) / 255
    error = np.abs(decode(rows, INT8, x.shape[-1], static).double().numpy() - x)
    # Where the range is next to nothing beside its place (or beside the guard), float32 itself is the limit.
    assert (error <= step / 2 * (1 + 1e-5) + 1e-6 * np.abs(x).max() + 1e-27).all()


@given(rows_of_floats)
@quick
def test_eight_bit_token_error_is_at_most_half_a_step_of_a_scale_that_fits(x: Array) -> None:
    rows = encoded(x, TOKEN)
    assert rows.saturated == 0
    fitting = np.maximum(np.abs(x).max(-1, keepdims=True).astype(np.float64), 2**-6) * STEP / 127
    error = np.abs(decode(rows, TOKEN, x.shape[-1]).double().numpy() - x)
    assert (error <= fitting / 2 * (1 + 1e-4)).all()


@given(rows_of_floats)
@quick
def test_four_bit_token_error_is_at_most_half_a_step_of_a_scale_that_fits(x: Array) -> None:
    rows = encoded(x, INT4)
    assert rows.saturated == 0
    fitting = np.maximum(np.abs(x).max(-1, keepdims=True).astype(np.float64), 2**-6) * STEP / 8
    error = np.abs(decode(rows, INT4, x.shape[-1]).double().numpy() - x)
    assert (error <= fitting / 2 * (1 + 1e-5)).all()


@given(rows_of_floats, st.sampled_from(["int8-token", "int4-token"]))
@quick
def test_rotated_error_is_bounded_in_length(x: Array, name: str) -> None:
    codec, dim = CODECS[name], x.shape[-1]
    x = x / 8  # a rotated row is at most √dim times larger, and the table ends at 1024
    rows = encoded(x, codec)
    assert rows.saturated == 0
    rotated = np.abs(x.astype(np.float64) @ numpy_hadamard(dim)).max(-1)
    step = np.maximum(rotated, 2**-6) * STEP / LEVELS[codec.bits]
    error = np.linalg.norm(decode(rows, codec, dim).double().numpy() - x, axis=-1)
    assert (error <= math.sqrt(dim) * step / 2 * (1 + 1e-4) + 1e-6).all()


@given(rows_of_floats, st.sampled_from([1.0, 1.5]))
@quick
def test_static_codes_are_a_fixed_point(x: Array, headroom: float) -> None:
    static = Static(torch.from_numpy(np.rint(x[0])), torch.full(x[0].shape, 0.125 * headroom))
    rows = encoded(x, INT8, static)
    restored = decode(rows, INT8, x.shape[-1], static)
    assert torch.equal(encode(restored, INT8, static).codes, rows.codes)


@given(rows_of_floats, st.sampled_from(TOKEN_CODECS))
@quick
def test_scales_never_shrink_as_rows_grow(x: Array, name: str) -> None:
    small, large = encoded(x / 2, CODECS[name]), encoded(x, CODECS[name])
    assert small.scales is not None
    assert large.scales is not None
    assert (small.scales <= large.scales).all()


@pytest.mark.parametrize("name", ["int8", "int8-token-unrotated", "int4-token-unrotated"])
def test_a_row_has_the_same_codes_alone_and_among_others(name: str) -> None:
    codec, x = CODECS[name], torch.from_numpy(gaussian(50, 2, 96))
    static = calibrated(x.numpy()) if name == "int8" else None
    whole = encode(x, codec, static)
    alone = torch.cat([encode(row[None], codec, static).codes for row in x])
    assert torch.equal(whole.codes, alone)


class TestFp8:
    """float8_e4m3fn, as other engines have it."""

    codec = CODECS["fp8"]

    def test_every_code_comes_back(self):
        numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        numbers = numbers[numbers.isfinite()]
        rows = encode(numbers.view(1, 1, -1), self.codec)
        assert torch.equal(decode(rows, self.codec, len(numbers))[0, 0], numbers)
        assert rows.saturated == 0

    def test_what_lies_beyond_the_largest_becomes_it_and_is_counted(self):
        x = torch.tensor([[[449.0, -460.0, 465.0, -1e9, torch.inf]]])
        rows = encode(x, self.codec)
        assert decode(rows, self.codec, 5).flatten().tolist() == [448, -448, 448, -448, 448]
        assert rows.saturated == 3

    def test_the_calibrated_scale_is_absmax_over_448(self):
        low, high = torch.tensor([[-3.0, -1.0], [0.0, -8.0]]), torch.tensor([[1.0, 2.0], [4.0, 7.0]])
        for granularity, largest in (("tensor", [8, 8, 8, 8]), ("head", [3, 3, 8, 8]), ("channel", [3, 2, 4, 8])):
            static = float_static(low, high, granularity, 1.0)
            torch.testing.assert_close(static.c.flatten() * 448, torch.tensor(largest, dtype=torch.float32))
            assert not static.mu.any()
