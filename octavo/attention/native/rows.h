// Rows as float32 numbers: widened, rotated, folded into the space of the codes and back.
#pragma once

#include <cmath>

#include "kernel.h"
#include "simd.h"

namespace octavo::ISA {

inline int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// f(a number of the type that a side lies in), if it is none of integer codes.
template <class F>
inline void with_number(Code code, F&& f) {
    if (code == Code::BF16) f(bf16{});
    else if (code == Code::FP16) f(fp16{});
    else if (code == Code::FP32) f(float{});
    else f(fp8{});
}

// A row as floats: out[dim], and zeros to a whole number of registers.
inline void widen(const Rows& x, int64_t token, int head, int dim, float* out) {
    with_float(x.type, [&](auto type) {
        const auto* in = static_cast<const decltype(type)*>(x.data) + token * x.token_stride + head * x.head_stride;
        int d = 0;
        for (; d + W <= dim; d += W) store(out + d, load_float(in + d));
        for (; d < dim; d++) out[d] = to_float(in[d]);
        for (; d % W; d++) out[d] = 0;
    });
}

template <int HALF>
inline void butterfly(float* x, int dim) {  // lanes i and i ^ HALF of each register become their sum and difference
    const f32v own = (counting() & HALF) != 0 ? splat(-1.0f) : splat(1.0f);
    for (int i = 0; i < dim; i += W) store(x + i, load<f32v>(x + i) * own + swapped<HALF>(load<f32v>(x + i)));
}

// Orthonormal Hadamard transform of the largest power of two that divides dim, block by block; its own inverse.
inline void rotate(float* x, int dim) {
    const int size = dim & -dim;
    butterfly<1>(x, dim);
    butterfly<2>(x, dim);
    if constexpr (W > 4) butterfly<4>(x, dim);  // dim is a multiple of 8
    if constexpr (W > 8) {
        if (size > 8) butterfly<8>(x, dim);
    }
    for (int half = W; half < size; half *= 2)
        for (int i = 0; i < dim; i += 2 * half)
            for (int j = i; j < i + half; j += W) {
                const f32v a = load<f32v>(x + j), b = load<f32v>(x + j + half);
                store(x + j, a + b);
                store(x + j + half, a - b);
            }
    const float scale = float(1.0 / std::sqrt(double(size)));  // as the specification rounds it
    for (int i = 0; i < dim; i += W) store(x + i, load<f32v>(x + i) * scale);
}

// q[dim] becomes scale·R(q ∘ c), whose products with codes are scores, but for scale·q·mu, which is the same for every
// key: that is returned if it is `shifted`, else 0.
inline float fold(float* q, const Side& k, float scale, int head, bool shifted) {
    constexpr int N = 8;  // sums side by side, on every processor: dim is a multiple
    const int dim = k.dim;
    float shift = 0, some[N] = {};
    for (int d = 0; d < dim; d++) q[d] *= scale;
    if (k.mu) {
        const float *mu = k.mu + int64_t(head) * dim, *c = k.c + int64_t(head) * dim;
        for (int d = 0; shifted && d < dim; d += N)
            for (int i = 0; i < N; i++) some[i] += q[d + i] * mu[d + i];
        for (int i = 0; i < N; i++) shift += some[i];
        for (int d = 0; d < dim; d++) q[d] *= c[d];
    }
    if (k.rotated) rotate(q, dim);
    return shift;
}

// A sum of codes becomes one of values: c ∘ R(x) + weight·mu, where weight is the sum of the weights.
inline void unfold(float* x, const Side& v, float weight, int head) {
    if (v.rotated) rotate(x, v.dim);
    if (!v.mu) return;
    const float *mu = v.mu + int64_t(head) * v.dim, *c = v.c + int64_t(head) * v.dim;
    for (int d = 0; d < v.dim; d++) x[d] = x[d] * c[d] + weight * mu[d];
}

}  // namespace octavo::ISA
