// One vector register of 32-bit lanes, in whatever the file is compiled for: AVX-512, AVX2, NEON or plain C++.
//
// Arithmetic, comparison and selection are the compiler's own vector operators. What they lack is here: the four-byte
// dot product that attention on codes is made of, registers of small floats, and powers of two.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "floats.h"

namespace octavo::ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // 32-bit lanes of a register
constexpr int ROWS = 2;  // query rows that share a pass over codes: two accumulators each, as there are registers for
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int ROWS = 1;
#else
constexpr int W = 4;
constexpr int ROWS = 1;
#endif
constexpr int PASS = 4;  // registers of tokens (for K) or channels (for V) in a pass

typedef float f32v __attribute__((vector_size(4 * W)));
typedef int32_t i32v __attribute__((vector_size(4 * W)));
typedef uint32_t u32v __attribute__((vector_size(4 * W)));
typedef uint8_t u8v __attribute__((vector_size(4 * W)));
typedef uint16_t u16h __attribute__((vector_size(2 * W)));

template <class V>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
inline void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
inline f32v splat(float x) { return x - f32v{}; }
inline i32v splat(int32_t x) { return x - i32v{}; }
inline f32v to_float(i32v x) { return __builtin_convertvector(x, f32v); }
// a·b + c, rounded once where the instruction set can. Sums whose bits must not depend on how a loop was compiled say so
// by this; no other product is fused with a sum (CMakeLists.txt: -ffp-contract=off).
inline f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
inline f32v max(f32v a, f32v b) { return a > b ? a : b; }  // b where a is NaN
inline f32v min(f32v a, f32v b) { return a < b ? a : b; }
inline f32v abs(f32v x) { return (f32v)((u32v)x & 0x7fffffffu); }
template <int... I>
inline i32v counting(std::integer_sequence<int, I...>) { return i32v{I...}; }
inline i32v counting() { return counting(std::make_integer_sequence<int, W>{}); }  // 0, 1, 2, …

// Lanes i and i ^ BY change places.
template <int BY, int... I>
inline f32v swapped(f32v a, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, a, (I ^ BY)...);
#else  // GCC 11
    return __builtin_shuffle(a, i32v{(I ^ BY)...});
#endif
}
template <int BY>
inline f32v swapped(f32v a) { return swapped<BY>(a, std::make_integer_sequence<int, W>{}); }

// One number from all lanes, by halves.
template <int BY = W / 2, class Op>
inline float reduce(f32v a, Op op) {
    a = op(a, swapped<BY>(a));
    if constexpr (BY > 1) return reduce<BY / 2>(a, op);
    else return a[0];
}
inline float max(f32v a) {
    return reduce(a, [](f32v x, f32v y) { return max(x, y); });
}
inline float sum(f32v a) {
    return reduce(a, [](f32v x, f32v y) { return x + y; });
}
// f(n as a constant of at most MOST).
template <int MOST, class F>
inline void with_constant(int64_t n, F&& f) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_constant<MOST - 1>(n, f);
    f(std::integral_constant<int, MOST>{});
}

// The low byte of each lane, W bytes in a row.
inline void store_bytes(void* p, i32v x) {
    typedef uint8_t u8q __attribute__((vector_size(W)));
    store(p, __builtin_convertvector((u32v)x & 255u, u8q));
}

// acc[i] + Σ_{j<4} a[4i+j]·b[4i+j], a unsigned, b signed, without saturation.
inline i32v dot4(i32v acc, u8v a, u8v b) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return (i32v)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    const __m512i x = (__m512i)a, y = (__m512i)b, low = _mm512_set1_epi16(255);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(x, low), _mm512_srai_epi16(_mm512_slli_epi16(y, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(y, 8));
    return acc + (i32v)even + (i32v)odd;
#elif defined(__AVXVNNI__)
    return (i32v)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    // vpmaddubsw would saturate at int16: widen even and odd bytes instead.
    const __m256i x = (__m256i)a, y = (__m256i)b, low = _mm256_set1_epi16(255);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, low), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
    return acc + (i32v)even + (i32v)odd;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (i32v)vusdotq_s32((int32x4_t)acc, (uint8x16_t)a, (int8x16_t)b);
#elif defined(__ARM_FEATURE_DOTPROD)
    // Signed by signed only: a = (a − 128) + 64 + 64.
    const int8x16_t y = (int8x16_t)b, x = (int8x16_t)(a ^ (uint8_t)128), half = vdupq_n_s8(64);
    return (i32v)vdotq_s32(vdotq_s32(vdotq_s32((int32x4_t)acc, x, y), half, y), half, y);
#else
    for (int i = 0; i < W; i++)
        for (int j = 0; j < 4; j++) acc[i] += int32_t(a[4 * i + j]) * int8_t(b[4 * i + j]);
    return acc;
#endif
}

// The four bytes at p in every lane.
inline u8v splat4(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return (u8v)splat(word);
}

inline f32v load_float(const float* p) { return load<f32v>(p); }
inline f32v load_float(const bf16* p) {
#if defined(__AVX512F__)
    return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
#elif defined(__AVX2__)
    return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
#else
    return (f32v)(__builtin_convertvector(load<u16h>(p), u32v) << 16);
#endif
}
inline f32v load_float(const fp16* p) {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
    return (f32v)_mm256_cvtph_ps(load<__m128i>(p));
#else
    f32v v;
    for (int i = 0; i < W; i++) v[i] = to_float(p[i]);
    return v;
#endif
}

inline f32v load_float(const fp8* p) {
#if defined(__AVX512F__)
    const i32v code = (i32v)_mm512_cvtepu8_epi32(load<__m128i>(p));
#elif defined(__AVX2__)
    const i32v code = (i32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    i32v code;
    for (int i = 0; i < W; i++) code[i] = p[i].bits;
#endif
    const f32v size = (f32v)((code & 0x7f) << 20) * 0x1p120f;
    return (f32v)((i32v)size | (code & 0x80) << 24);
}

// 2·W neighbouring numbers in two registers, whose lanes stand as is quickest; `in_order` brings them, or sums of such, into
// the order of memory.
template <class T>
inline void load_pair(const T* p, f32v& a, f32v& b) { a = load_float(p), b = load_float(p + W); }
template <class T>
inline void in_order(f32v&, f32v&) {}
#if defined(__AVX2__) && !defined(__AVX512F__)
inline void load_pair(const bf16* p, f32v& a, f32v& b) {  // zeros below each: two operations in place of four
    const __m256i both = load<__m256i>(p);
    a = (f32v)_mm256_unpacklo_epi16(__m256i{}, both), b = (f32v)_mm256_unpackhi_epi16(__m256i{}, both);
}
template <>
inline void in_order<bf16>(f32v& a, f32v& b) {
    const f32v low = a;
    a = (f32v)_mm256_permute2f128_ps((__m256)low, (__m256)b, 0x20);
    b = (f32v)_mm256_permute2f128_ps((__m256)low, (__m256)b, 0x31);
}
#endif

constexpr float LOG2E = 1.44269504f;
constexpr float MAGIC = 0x1.8p23f;  // added to |x| < 2²²: rounds to an integer, half to even, and holds it in the low bits
inline i32v nearest(f32v x) { return (i32v)(x + MAGIC) - (i32v)splat(MAGIC); }

// 2^x for x ≤ 0, relative error below 3e-7; never less than 2^−126.
inline f32v exp2(f32v x) {
    x = max(splat(-126.0f), x);
    const f32v n = (x + MAGIC) - MAGIC, r = x - n;
    f32v p = splat(1.32647e-3f);
    p = fma(p, r, splat(9.67151e-3f));
    p = fma(p, r, splat(5.550734e-2f));
    p = fma(p, r, splat(2.4022242e-1f));
    p = fma(p, r, splat(6.9314698e-1f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
    return (f32v)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (f32v)((__builtin_convertvector(n, i32v) + 127) << 23);
#endif
}

// table[index[i]] of a table that doubles every 16 entries: those are a register, and the octave is an exponent.
inline f32v look_up(const float* table, const uint8_t* index) {
#if defined(__AVX512F__)
    const i32v at = (i32v)_mm512_cvtepu8_epi32(load<__m128i>(index));
    const i32v first = (i32v)_mm512_permutexvar_ps((__m512i)at, load<__m512>(table));
    return (f32v)(first + (at >> 4 << 23));
#elif defined(__AVX2__)
    const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
    const __m256 low = _mm256_permutevar8x32_ps(load<__m256>(table), at);  // by the lowest three bits
    const __m256 high = _mm256_permutevar8x32_ps(load<__m256>(table + 8), at);
    const i32v first = (i32v)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(at, 28));  // by the fourth
    return (f32v)(first + ((i32v)at >> 4 << 23));
#else
    f32v x;
    for (int i = 0; i < W; i++) x[i] = table[index[i]];
    return x;
#endif
}

}  // namespace octavo::ISA
