// Products of rows with a page: c[r, n] = Σ_k a[r, k]·page[k, n].
//
// A page of one head, 64 tokens, is a matrix on either side: of K [dim, 64], whose columns are tokens and whose products
// with queries are scores; of V [64, dim], whose products with weights are sums of values. Every element of c is one
// chain of fused multiply-adds in ascending k that starts from 0. How many rows share a pass, and whether the page's
// codes are widened in registers (few rows) or once into a tile of floats (many), changes no bit of it.
#pragma once

#include "ahead.h"
#include "kernel.h"
#include "simd.h"

namespace octavo::ISA {

struct Matrix {  // of rows: element [r, i] is at[r·row + i]
    float* at;
    int64_t row;
    Matrix from(int64_t first_row, int64_t column = 0) const { return {at + first_row * row + column, row}; }
};

struct Range {  // [from, to)
    int from, to;
};

// Few rows: c = a·page, or c·keep[r] + a·page, the page's codes widened in registers; `next` is read soon. Only `tokens`
// count: scores of others may be left as they are, and their values are not read.
void multiply(const Side& side, Matrix a, int rows, const uint8_t* page, Bytes next, Range tokens, Matrix c,
              const float* keep);

// Many rows: a page is first widened, those k of it that are asked for, into a tile [panels, depth, PANEL] of floats, where
// columns of a panel lie side by side.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12, TILE_REGISTERS = 2;  // accumulators, as there are registers for
#elif defined(__ARM_NEON)
constexpr int TILE_ROWS = 6, TILE_REGISTERS = 4;
#else
constexpr int TILE_ROWS = 6, TILE_REGISTERS = 2;
#endif
constexpr int PANEL = TILE_REGISTERS * W;  // columns of a tile that lie side by side: a tile is [panels, depth, PANEL]

// What codes are multiplied with that were widened, or sums of them: those of a byte are numbers in its highest bits.
inline float unit(Code code) { return code == Code::INT8 ? 0x1p-24f : code == Code::INT4 ? 0x1p-28f : 1.0f; }

inline int panels(int width) { return (width + PANEL - 1) / PANEL; }

void widen_page(const Side& side, const uint8_t* page, Range k, float* tile);

// Some rows, at most TILE_ROWS, times one panel of a side's tile.
void multiply_panel(const Side& side, Matrix a, int rows, const float* panel, Range k, Matrix c, const float* keep);

}  // namespace octavo::ISA
