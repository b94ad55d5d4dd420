// Products of rows with a page: c[r, n] = Σ_k a[r, k]·page[k, n].
//
// A page of one head, 64 tokens, is a matrix on either side: of K [dim, 64], whose columns are tokens and whose products
// with queries are scores; of V [64, dim], whose products with weights are sums of values. Every element of c is one
// chain of fused multiply-adds in ascending k that starts from 0. How many rows share a pass, and whether the page's
// codes are widened in registers (few rows) or once into a tile of floats (many), changes no bit of it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernel.h"
#include "simd.h"

namespace octavo::ISA {

// How codes of a byte become floats, centered: behind the exponent of a power of two the code's bits are a number, from
// which that power and the centre are taken away at once. Bytes of four neighbouring k share a 32-bit lane; `FIRST` is
// where the code of the first begins, bits that are not `KEPT` are another's.
template <int FIRST, uint32_t KEPT, uint32_t EXPONENT, int POWER, int CENTRE_TIMES_2>
struct Codes {
    template <int J>
    static f32v widen(u8v quad) {
        constexpr int SHIFT = FIRST + 8 * J;
        u32v x = (u32v)quad;
        if constexpr (SHIFT < 0) x <<= -SHIFT;
        if constexpr (SHIFT > 0) x >>= SHIFT;
        if constexpr (SHIFT < 24 || KEPT != 255) x &= KEPT;
        return (f32v)(x ^ EXPONENT) - float((1 << POWER) + CENTRE_TIMES_2 / 2.0);
    }
};
struct Int8K : Codes<0, 0xff, 0x4b000000, 23, 256> {};  // stored as code + 128
struct Int8V : Codes<0, 0xff, 0x4b000080, 23, 256> {};
struct Int4Low : Codes<-4, 0xf0, 0x49000000, 19, 15> {};
struct Int4High : Codes<0, 0xf0, 0x49000000, 19, 15> {};
struct Int4K {};  // k below dim/2 are the low halves, the others the high ones

template <class T>
constexpr bool is_code = !std::is_same_v<T, bf16> && !std::is_same_v<T, fp16> && !std::is_same_v<T, float>;
template <class T>
constexpr int CELL = is_code<T> ? 4 : sizeof(T);  // bytes of a column: of one k, of codes of four

// The next page, asked for at the pace at which this one is read: a burst would only queue, and leave the memory idle in
// between. `passes`: how often the page is read.
struct Ahead {
    const uint8_t *at, *end;
    int passes;
    void read(int bytes) {
        for (; bytes > 0 && at < end; bytes -= 64 * passes, at += 64) __builtin_prefetch(at, 0, 2);
    }
};
struct Near {  // nothing to ask for: a tile is in the cache
    void read(int) {}
};

struct Matrix {  // of rows: element [r, i] is at[r·row + i]
    float* at;
    int64_t row;
    Matrix from(int64_t first_row, int64_t column = 0) const { return {at + first_row * row + column, row}; }
};

struct Range {  // [from, to)
    int from, to;
};

// sum += a[r, k]·page[k, ·] for the k of a range.
template <class T, int R, int N, class Next>
[[gnu::always_inline]] inline void walk(const float* a, int64_t row, const uint8_t* page, int64_t pitch, Range k,
                                        Next& ahead, f32v (&sum)[R][N]) {
    auto add = [&](int at, auto&& value) __attribute__((always_inline)) {
        f32v x[N];
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) x[i] = value(i);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const f32v factor = splat(a[r * row + at]);
#pragma GCC unroll 16
            for (int i = 0; i < N; i++) sum[r][i] = fma(factor, x[i], sum[r][i]);
        }
    };
    if constexpr (is_code<T>) {
        page += k.from / 4 * pitch;
        for (int at = k.from / 4 * 4; at < k.to; at += 4, page += pitch) {
            ahead.read(4 * N * W);
            add(at, [&](int i) { return T::template widen<0>(load<u8v>(page + 4 * i * W)); });
            add(at + 1, [&](int i) { return T::template widen<1>(load<u8v>(page + 4 * i * W)); });
            add(at + 2, [&](int i) { return T::template widen<2>(load<u8v>(page + 4 * i * W)); });
            add(at + 3, [&](int i) { return T::template widen<3>(load<u8v>(page + 4 * i * W)); });
        }
    } else {
        page += k.from * pitch;
        for (int at = k.from; at < k.to; at++, page += pitch) {
            ahead.read(N * W * sizeof(T));
            add(at, [&](int i) { return load_float(reinterpret_cast<const T*>(page) + i * W); });
        }
    }
}

// R rows of a and N registers of columns; cells of one k are `pitch` bytes from those of the next. Without `keep` c
// becomes the sum, with it c·keep[r] + the sum. Of a last, single register (N = 1) only `left` lanes are columns. A
// function of its own, its last loops unrolled by force: else GCC keeps the sums in memory.
template <class T, int R, int N, class Next>
[[gnu::noinline]] void chains(Matrix a, const uint8_t* page, int64_t pitch, Range k, Next& ahead, Matrix c,
                              const float* keep, int left) {
    f32v sum[R][N] = {};
    if constexpr (std::is_same_v<T, Int4K>) {
        walk<Int4Low>(a.at, a.row, page, pitch, {0, k.to / 2}, ahead, sum);
        walk<Int4High>(a.at + k.to / 2, a.row, page, pitch, {0, k.to / 2}, ahead, sum);
    } else {
        walk<T>(a.at, a.row, page, pitch, k, ahead, sum);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) {
            float* to = c.at + r * c.row + i * W;
            f32v x = sum[r][i];
            if (keep) x = fma(load<f32v>(to), splat(keep[r]), x);
            if (N == 1 && left < W) x = counting() < left ? x : load<f32v>(to);
            store(to, x);
        }
}

// f(rows as a constant of at most MOST).
template <int MOST, class F>
inline void with_rows(int rows, F&& f) {
    if constexpr (MOST > 1)
        if (rows < MOST) return with_rows<MOST - 1>(rows, f);
    f(std::integral_constant<int, MOST>{});
}

// ------------------------------------------------------------------------------------- few rows: widened in registers

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int DIRECT_ROWS = 4, DIRECT_REGISTERS = 4;
#else
constexpr int DIRECT_ROWS = 4, DIRECT_REGISTERS = 2;
#endif

// Columns from n on, N registers of them at a time and fewer at the end.
template <class T, int N>
void direct_columns(Matrix a, int rows, const uint8_t* page, int width, Range k, Ahead& ahead, Matrix c,
                    const float* keep, int n = 0) {
    for (; N == 1 ? n < width : n + N * W <= width; n += N * W)
        for (int r = 0; r < rows; r += DIRECT_ROWS)
            with_rows<DIRECT_ROWS>(std::min(rows - r, DIRECT_ROWS), [&](auto together) {
                chains<T, decltype(together)::value, N>(a.from(r), page + n * CELL<T>, int64_t(width) * CELL<T>, k, ahead,
                                                        c.from(r, n), keep ? keep + r : nullptr, width - n);
            });
    if constexpr (N > 1)
        if (n < width) direct_columns<T, N / 2>(a, rows, page, width, k, ahead, c, keep, n);
}

template <class T>
void direct(Matrix a, int rows, const uint8_t* page, int width, Range k, Ahead& ahead, Matrix c, const float* keep) {
    if (rows <= 2) direct_columns<T, 4>(a, rows, page, width, k, ahead, c, keep);
    else direct_columns<T, DIRECT_REGISTERS>(a, rows, page, width, k, ahead, c, keep);
}

// f(kind of number, first column, columns) for the matrices, side by side, that a page is.
template <class F>
void by_kind(const Side& side, F&& f) {
    const int width = side.is_k ? BLOCK : side.dim;
    switch (side.code) {
        case Code::BF16: return f(bf16{}, 0, width);
        case Code::FP16: return f(fp16{}, 0, width);
        case Code::FP32: return f(float{}, 0, width);
        case Code::INT8: return side.is_k ? f(Int8K{}, 0, width) : f(Int8V{}, 0, width);
        case Code::INT4:
            if (side.is_k) return f(Int4K{}, 0, width);
            f(Int4Low{}, 0, width / 2);
            f(Int4High{}, width / 2, width / 2);
    }
}

// c = a·page, or c·keep + a·page, of few rows.
inline void multiply(const Side& side, Matrix a, int rows, const uint8_t* page, const uint8_t* next, Range k, Matrix c,
                     const float* keep) {
    const int passes = (rows + DIRECT_ROWS - 1) / DIRECT_ROWS * (side.code == Code::INT4 ? 2 : 1);
    Ahead ahead = {next, next + side.head_bytes, passes};
    by_kind(side, [&](auto kind, int first, int width) {
        direct<decltype(kind)>(a, rows, page, width, k, ahead, c.from(0, first), keep);
    });
}

// ----------------------------------------------------------------------------------------- many rows: a tile of floats

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12, TILE_REGISTERS = 2;  // accumulators, as there are registers for
#elif defined(__ARM_NEON)
constexpr int TILE_ROWS = 6, TILE_REGISTERS = 4;
#else
constexpr int TILE_ROWS = 6, TILE_REGISTERS = 2;
#endif
constexpr int PANEL = TILE_REGISTERS * W;  // columns of a tile that lie side by side: a tile is [panels, depth, PANEL]

inline int panels(int width) { return (width + PANEL - 1) / PANEL; }

// A page's rows of k as a tile of `depth` rows.
template <class T>
void widen_into(const uint8_t* page, int width, Range k, float* tile, int depth, int first_row, int first_column) {
    auto put = [&](int at, int n, f32v x) __attribute__((always_inline)) {
        const int column = first_column + n;
        float* row = tile + int64_t(first_row + at) * PANEL;
        if (column % W == 0) return store(row + int64_t(column / PANEL) * depth * PANEL + column % PANEL, x);
        for (int i = 0; i < std::min(W, width - n); i++)
            row[int64_t((column + i) / PANEL) * depth * PANEL + (column + i) % PANEL] = x[i];
    };
    const int64_t pitch = int64_t(width) * CELL<T>;
    for (int n = 0; n < width; n += W) {
        const uint8_t* from = page + n * CELL<T>;
        if constexpr (is_code<T>)
            for (int at = k.from / 4 * 4; at < k.to; at += 4) {
                const u8v quad = load<u8v>(from + at / 4 * pitch);
                put(at, n, T::template widen<0>(quad));
                put(at + 1, n, T::template widen<1>(quad));
                put(at + 2, n, T::template widen<2>(quad));
                put(at + 3, n, T::template widen<3>(quad));
            }
        else
            for (int at = k.from; at < k.to; at++)
                put(at, n, load_float(reinterpret_cast<const T*>(from + at * pitch)));
    }
}

inline void widen_page(const Side& side, const uint8_t* page, Range k, float* tile) {
    const int depth = side.is_k ? side.dim : BLOCK;
    by_kind(side, [&](auto kind, int first, int width) {
        if constexpr (std::is_same_v<decltype(kind), Int4K>) {
            widen_into<Int4Low>(page, width, {0, depth / 2}, tile, depth, 0, first);
            widen_into<Int4High>(page, width, {0, depth / 2}, tile, depth, depth / 2, first);
        } else {
            widen_into<decltype(kind)>(page, width, k, tile, depth, 0, first);
        }
    });
}

// Some rows, at most TILE_ROWS, times one panel.
inline void multiply_panel(Matrix a, int rows, const float* panel, Range k, Matrix c, const float* keep) {
    Near none;
    with_rows<TILE_ROWS>(rows, [&](auto together) {
        chains<float, decltype(together)::value, TILE_REGISTERS>(a, reinterpret_cast<const uint8_t*>(panel),
                                                                 PANEL * sizeof(float), k, none, c, keep, PANEL);
    });
}

}  // namespace octavo::ISA
