// Arrays of any length by registers, and the functions that are computed on them.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace octavo::ISA {

// f(i, n) for vectors of n = W elements from i on, and a last one of fewer.
template <class F>
inline void each_vector(int64_t count, F&& f) {
    int64_t i = 0;
    for (; i + W <= count; i += W) f(i, W);
    if (i < count) f(i, int(count - i));
}
template <class T>
inline f32v load_some(const T* p, int n) {
    if (n == W) return load_float(p);
    T some[W] = {};
    std::copy_n(p, n, some);
    return load_float(some);
}
template <class T>
inline void store_some(T* p, f32v v, int n) {
    if constexpr (sizeof(T) == 4)
        if (n == W) return store(p, v);
    for (int i = 0; i < n; i++) from_float(v[i], p[i]);
}

inline f32v sigmoid(f32v x) {
    const f32v e = exp2(abs(x) * -LOG2E);  // of what is not above 0
    return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}
inline f32v silu(f32v x) { return x * sigmoid(x); }

}  // namespace octavo::ISA
