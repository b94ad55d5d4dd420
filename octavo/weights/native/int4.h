// What Python hands to the kernels of 4-bit weights: plain structs of pointers and sizes.
#pragma once

#include <cstdint>

#include "types.h"

namespace octavo::weights {

constexpr int TILE = 16;  // output columns of a tile: lanes of the widest register

// The weight of a linear layer, [out, in], in tiles of 16 outputs; `group` is 16, 32, 64 or 128 and divides `in`.
//
//     codes   u8 [⌈out/16⌉, in/8, 16, 4]     byte j of an output: input j of the eight in the low half, j + 4 in the high
//     scales  [⌈out/16⌉, in/group, 16]       of the type `scale`
//     zeros   u8 [⌈out/16⌉, in/group, 16]
struct Matrix {
    int64_t out, in;
    int group;
    const uint8_t* codes;
    const void* scales;
    Float scale;
    const uint8_t* zeros;
};

struct Int4Kernels {
    // y [rows, out] = x [rows, in]·Wᵀ + bias [out] or null, all of one type. x rows are contiguous, `stride` apart.
    void (*multiply)(const Matrix&, const void* x, int64_t rows, int64_t stride, Float, const void* bias, void* y,
                     const Pool&);
    // Rows first … first + count of W as numbers: [count, in]; `first` is a multiple of 16.
    void (*decode)(const Matrix&, int64_t first, int64_t count, Float, void* w, const Pool&);
};

}  // namespace octavo::weights
