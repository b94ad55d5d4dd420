// Numbers of 16 and 8 bits, one at a time. Registers of them: simd.h.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "types.h"

namespace octavo::ISA {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct fp8 { uint8_t bits; };  // e4m3: the largest is 448, there is no infinity, and we store no NaN

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float to_float(fp16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    float f;
    if (rest >= 0x7c00) {  // inf, NaN
        const uint32_t bits = 0x7f800000u | (rest & 0x3ff) << 13;
        std::memcpy(&f, &bits, 4);
    } else {  // an exponent shift that normal and subnormal numbers share
        const uint32_t bits = rest << 13;
        std::memcpy(&f, &bits, 4);
        f *= 0x1p112f;
    }
    return sign ? -f : f;
}
inline float to_float(fp8 x) {
    const uint32_t bits = uint32_t(x.bits & 0x7f) << 20;
    float f;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p120f;  // an exponent shift that normal and subnormal numbers share
    return x.bits & 0x80 ? -f : f;
}
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) out.bits = uint16_t(bits >> 16 | 64);  // NaN stays NaN
    else out.bits = uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);          // to even
}
// The float of these bits in steps of the last place of `large`, a power of two that it is small beside: how many, to even.
inline uint32_t rounded_beside(float large, uint32_t bits) {
    return std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + large) - std::bit_cast<uint32_t>(large);
}
inline void from_float(float x, fp16& out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) { out.bits = sign | 0x7e00; return; }
    if (bits >= 0x477ff000u) { out.bits = sign | 0x7c00; return; }  // rounds beyond the largest
    if (bits < 0x38800000u) {  // subnormal: let a float addition do the rounding
        out.bits = sign | uint16_t(rounded_beside(0.5f, bits));
        return;
    }
    bits += 0xfff + (bits >> 13 & 1);
    out.bits = sign | uint16_t((bits - 0x38000000u) >> 13);
}

inline void from_float(float x, fp8& out) {  // what is beyond the largest becomes it, and so does a NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint8_t sign = bits >> 24 & 0x80;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) { out.bits = 0x7e; return; }
    if (bits >= 0x43e00000u) { out.bits = sign | 0x7e; return; }  // 448
    if (bits < 0x3c800000u) {  // below 2⁻⁶, in steps of 2⁻⁹: let a float addition do the rounding
        out.bits = sign | uint8_t(rounded_beside(16384.0f, bits));
        return;
    }
    bits += 0x7ffffu + (bits >> 20 & 1);  // to even
    out.bits = sign | uint8_t((bits >> 20) - (120 << 3));
}

// f(a number of that type).
template <class F>
void with_float(Float type, F&& f) {
    if (type == Float::BF16) f(bf16{});
    else if (type == Float::FP16) f(fp16{});
    else f(float{});
}

}  // namespace octavo::ISA
