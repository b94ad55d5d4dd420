// What Python hands to the kernels between products.
#pragma once

#include <cstdint>

#include "types.h"

namespace octavo::weights {

enum class Function : int { SILU, GELU, GELU_TANH };

// Numbers of `count` heads of every row, in floats from one to the next.
struct Heads {
    const float* first;
    int64_t count, stride, row_stride;
};

struct ElementwiseKernels {
    // y [count] = f(x) of numbers of one type.
    void (*activate)(Function, const void* x, int64_t count, Float, void* y, const Pool&);
    // y [rows, dim] = x / sqrt(mean(x²) + epsilon) ∘ weight [dim]; rows of x are `stride` apart, those of y contiguous.
    void (*rms_norm)(const float* x, int64_t rows, int64_t stride, int64_t dim, const float* weight, float epsilon,
                     float* y, const Pool&);
    // The same of each `group` of a row's numbers, y [rows, dim] = norm(x ∘ silu(gate)) ∘ weight, or norm(x) ∘ weight ∘
    // silu(gate).
    void (*gated_norm)(const float* x, int64_t stride, const float* gate, int64_t gate_stride, int64_t rows, int64_t dim,
                       int64_t group, const float* weight, float epsilon, bool gate_first, float* y, const Pool&);
    // gate [count] = silu(gate) ∘ up.
    void (*silu_gate)(float* gate, const float* up, int64_t count, const Pool&);
    // y [rows, heads, dim] = x ∘ cos + (−second half of x, first half) ∘ sin, with cos and sin [rows, dim].
    void (*rope)(const Heads& x, int64_t rows, int64_t dim, const float* cos, int64_t cos_stride, const float* sin,
                   int64_t sin_stride, float* y, const Pool&);
};

}  // namespace octavo::weights
