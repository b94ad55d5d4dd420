"""What every kernel knows of codes: how they become numbers, what a token scale is, and the rotation.

Converting codes one by one would be the bottleneck, not reading them: on Hopper an int → float instruction runs at an
eighth of the rate of others. Inline assembly therefore converts the four bytes of a register at once: a byte under the
exponent 0x64 is the float16 number 1024 + byte, and one packed subtraction leaves the code. Triton's interpreter runs
no assembly, so each conversion has its plain form beside it; both are exact, hence equal (a test steps through the
assembly).
"""

from __future__ import annotations

import math
import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_8BIT = tl.constexpr(-6 - math.log2(127))  # log2 of TOKEN_SCALE[bits][e] is this + (e + 1)/16
LOG2_4BIT = tl.constexpr(-6 - math.log2(8))
FP8 = tl.constexpr(-8)  # in the place of a number of bits: float8_e4m3fn, in uint8
ROUND = tl.constexpr(1.5 * 2**23)  # added and taken away again rounds |y| < 2²² to the nearest integer, ties to even


# Assembly, four codes a register: $0 and $1 are pairs of float16, the last operand is the codes.
NUMBERS = tl.constexpr("""{
    .reg .b32 unsigned, offset;
    xor.b32 unsigned, $2, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, unsigned, 0x64646464, 0x4140;
    prmt.b32 $1, unsigned, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
}""")
# (1024 + 16·nibble)/16 − 71.5 is nibble − 7.5 in one fused step; `nibbles` are the high halves of their bytes.
CENTERED = """{
    .reg .b32 nibbles, scale, offset;
    %s
    mov.b32 scale, 0x2c002c00;
    mov.b32 offset, 0xd478d478;
    prmt.b32 $0, nibbles, 0x64646464, 0x4140;
    prmt.b32 $1, nibbles, 0x64646464, 0x4342;
    fma.rn.f16x2 $0, $0, scale, offset;
    fma.rn.f16x2 $1, $1, scale, offset;
}"""
HIGH_NUMBERS = tl.constexpr(CENTERED % "and.b32 nibbles, $2, 0xf0f0f0f0;")
LOW_NUMBERS = tl.constexpr(CENTERED % "shl.b32 nibbles, $2, 4;\n    and.b32 nibbles, nibbles, 0xf0f0f0f0;")
LOW_NIBBLES = tl.constexpr("""{
    and.b32 $0, $1, 0x0f0f0f0f;
}""")
HIGH_NIBBLES = tl.constexpr("""{
    .reg .b32 high;
    shr.b32 high, $1, 4;
    and.b32 $0, high, 0x0f0f0f0f;
}""")


@triton.jit
def numbers(codes):
    """int8 codes as float16."""
    if INTERPRETED:
        return codes.to(tl.float16)
    return tl.inline_asm_elementwise(NUMBERS, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def low_numbers(codes):
    """The centered low nibbles of uint8 as float16: −7.5 … 7.5."""
    if INTERPRETED:
        return (codes & 15).to(tl.float16) - 7.5
    return tl.inline_asm_elementwise(LOW_NUMBERS, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def high_numbers(codes):
    """The centered high nibbles, as `low_numbers`."""
    if INTERPRETED:
        return (codes >> 4).to(tl.float16) - 7.5
    return tl.inline_asm_elementwise(HIGH_NUMBERS, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def low_nibbles(codes):
    """The low nibbles of uint8 as int8: 0 … 15."""
    if INTERPRETED:
        return (codes & 15).to(tl.int8)
    return tl.inline_asm_elementwise(LOW_NIBBLES, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def high_nibbles(codes):
    if INTERPRETED:
        return (codes >> 4).to(tl.int8)
    return tl.inline_asm_elementwise(HIGH_NIBBLES, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def fp8_numbers(codes):
    """float8_e4m3fn as float16, exactly: its exponent has another offset, and a place less."""
    codes = codes.to(tl.int16)
    return (((codes & 128) << 8) | ((codes & 127) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def fp8_bits(y):
    """float32 as float8_e4m3fn, ties to even; what is beyond the largest becomes it."""
    size = tl.minimum(tl.abs(y), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # below 2⁻⁶, in steps of 2⁻⁹
    sign = (y.to(tl.int32, bitcast=True) >> 24) & 128
    return tl.where(size < 0.015625, small, normal) | sign


@triton.jit
def log2_scale(e, BITS: tl.constexpr):
    """log2 of the token scales whose one-byte indices are `e`: the table is a straight line."""
    return (e.to(tl.float32) + 1) / 16 + (LOG2_4BIT if BITS == 4 else LOG2_8BIT)


@triton.jit
def dot(a, b, sum_, PRECISION: tl.constexpr):
    """sum_ + a·b. The interpreter cannot multiply bfloat16, which it has as bit patterns, and is slow with others."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_)
    return tl.dot(a, b, sum_, input_precision=PRECISION)


@triton.jit
def dot_bytes(a, b):
    """a·b of int8 as int32. In float32 it is exact too: no sum here reaches 2²⁴."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32)).to(tl.int32)
    return tl.dot(a, b, out_dtype=tl.int32)


@triton.jit
def butterfly(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Sums and differences of columns that are HALF apart."""
    x = tl.reshape(x, [ROWS, WIDTH // (2 * HALF), 2, HALF])
    low, high = tl.split(tl.permute(x, 0, 1, 3, 2))
    return tl.reshape(tl.permute(tl.join(low + high, low - high), 0, 1, 3, 2), [ROWS, WIDTH])


@triton.jit
def rotate(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """`octavo.quant.codec.rotate` of x [ROWS, WIDTH], 0 beyond DIM: the same sums in the same order."""
    size: tl.constexpr = DIM & -DIM
    for i in tl.static_range(8):
        if 1 << i < size:
            x = butterfly(x, ROWS, WIDTH, 1 << i)
    return x * (size**-0.5)
