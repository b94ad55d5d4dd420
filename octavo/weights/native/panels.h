// What Python hands to the kernels of plain weights: plain structs of pointers and sizes.
#pragma once

#include <cstdint>

#include "types.h"

namespace octavo::weights {

constexpr int PANEL = 16;  // output columns of a panel: a multiple of every register's lanes

// The weight of a linear layer, [out, in], in panels of 16 outputs: [⌈out/16⌉, in, 16]; the last may be padded. As `pairs`, for
// processors that multiply pairs of bf16 numbers: [⌈out/16⌉, in/2, 16, 2].
struct Panels {
    int64_t out, in;
    const void* weight;
    Float type;
    bool pairs;
};

// What one weight makes of the rows: y [rows, out] = plus + (x·Wᵀ + bias [out]). Bias and plus may be null.
struct Product {
    Panels weight;
    const void* bias;
    void* y;
    const void* plus = nullptr;
};

struct PanelKernels {
    bool pairs;  // whether it can be given them, on a processor that has bf16
    bool (*has_tiles)();  // whether a matrix unit then multiplies them
    // Products of the rows x [rows, in] with some weights, all of one `in` and one type; x, biases and y are of one type
    // too, x rows contiguous and `stride` apart; with pairs of weights they are rounded to bf16 first. With `gated`, of
    // two weights of one size and x in float32, the first's y becomes silu(its product) ∘ the second's product, and the
    // second has none. Sums are float32 and y is rounded once. Every element is summed in one order, whatever the shape
    // of the rest: see panels.cpp.
    void (*multiply)(const Product*, int products, bool gated, const void* x, int64_t rows, int64_t stride, Float,
                     const Pool&);
    // The panels of W [out, in], `stride` elements from row to row, of any type of that many bytes.
    void (*pack)(const void* w, int64_t out, int64_t in, int64_t stride, int bytes, void* panels, const Pool&);
    // Multiply-adds in registers, `steps` of every accumulator on each thread; returns how many floating-point operations
    // that was. The yardstick of benchmarks/products_cpu.py.
    int64_t (*spin)(int64_t steps, const Pool&);
};

}  // namespace octavo::weights
