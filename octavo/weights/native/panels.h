// What Python hands to the kernels of plain weights: plain structs of pointers and sizes.
#pragma once

#include <cstdint>

#include "types.h"

namespace octavo::weights {

constexpr int PANEL = 16;  // output columns of a panel: a multiple of every register's lanes

// The weight of a linear layer, [out, in], in panels of 16 outputs: [⌈out/16⌉, in, 16]; the last may be padded.
struct Panels {
    int64_t out, in;
    const void* weight;
    Float type;
};

struct PanelKernels {
    // y [rows, out] = x [rows, in]·Wᵀ + bias [out] or null; x, bias and y are of one type, x rows contiguous and `stride`
    // apart. Products and sums are float32 and y is rounded once. Every element of y is summed in one order, whatever
    // the shape of the rest: see panels.cpp.
    void (*multiply)(const Panels&, const void* x, int64_t rows, int64_t stride, Float, const void* bias, void* y,
                     const Pool&);
    // The panels of W [out, in], `stride` elements from row to row, of any type of that many bytes.
    void (*pack)(const void* w, int64_t out, int64_t in, int64_t stride, int bytes, void* panels, const Pool&);
    // Multiply-adds in registers, `steps` of every accumulator on each thread; returns how many floating-point operations
    // that was. The yardstick of benchmarks/products_cpu.py.
    int64_t (*spin)(int64_t steps, const Pool&);
};

}  // namespace octavo::weights
