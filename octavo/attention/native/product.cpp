// Products of rows with a page; product.h says what they are.
#include "product.h"

#include <algorithm>
#include <type_traits>

#include "ahead.h"

namespace octavo::ISA {
namespace {

// Codes of a byte, four of neighbouring k in a 32-bit lane. One that stands alone in a lane's highest byte is, as a number,
// itself times 2^24: sums are of such numbers, and are scaled at their end. `signs` centers four codes at once.
struct Int8K {  // stored as code + 128
    static u8v signs(u8v quad) { return quad ^ uint8_t(128); }
};
struct Int8V {
    static u8v signs(u8v quad) { return quad; }
};
struct Int4High {  // code − 7.5 times 16
    static u8v signs(u8v quad) { return (quad & uint8_t(0xf0)) ^ uint8_t(0x88); }
};
struct Int4Low {
    static u8v signs(u8v quad) { return ((u8v)((u32v)quad << 4) & uint8_t(0xf0)) ^ uint8_t(0x88); }
};
struct Int4K {};  // k below dim/2 are the low halves, the others the high ones

template <int J>
inline f32v widen(u8v signs) {
#if defined(__AVX512BW__)
    const __m512i at = _mm512_or_si512(_mm512_set1_epi32(J << 24 | 0x808080),
                                       _mm512_set4_epi32(12 << 24, 8 << 24, 4 << 24, 0));
    const i32v top = (i32v)_mm512_shuffle_epi8((__m512i)signs, at);
#elif defined(__AVX2__)
    const __m256i at = _mm256_setr_epi32(J << 24 | 0x808080, (J + 4) << 24 | 0x808080, (J + 8) << 24 | 0x808080,
                                         (J + 12) << 24 | 0x808080, J << 24 | 0x808080, (J + 4) << 24 | 0x808080,
                                         (J + 8) << 24 | 0x808080, (J + 12) << 24 | 0x808080);
    const i32v top = (i32v)_mm256_shuffle_epi8((__m256i)signs, at);
#else
    const i32v top = (i32v)((u32v)signs << (24 - 8 * J) & 0xff000000u);
#endif
    return to_float(top);
}

// What a sum of such numbers is multiplied with.
inline float unit(Code code) { return code == Code::INT8 ? 0x1p-24f : code == Code::INT4 ? 0x1p-28f : 1.0f; }

template <class T>
constexpr bool is_code = !std::is_same_v<T, bf16> && !std::is_same_v<T, fp16> && !std::is_same_v<T, float> &&
                        !std::is_same_v<T, fp8>;
template <class T>
constexpr int CELL = is_code<T> ? 4 : sizeof(T);  // bytes of a column: of one k, of codes of four

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
            u8v quad[N];
#pragma GCC unroll 16
            for (int i = 0; i < N; i++) quad[i] = T::signs(load<u8v>(page + 4 * i * W));
            add(at, [&](int i) { return widen<0>(quad[i]); });
            add(at + 1, [&](int i) { return widen<1>(quad[i]); });
            add(at + 2, [&](int i) { return widen<2>(quad[i]); });
            add(at + 3, [&](int i) { return widen<3>(quad[i]); });
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
// becomes the sum times `unit`, with it c·keep[r] + that. Of a last, single register (N = 1) only `left` lanes are columns. A
// function of its own, its last loops unrolled by force: else GCC keeps the sums in memory.
template <class T, int R, int N, class Next>
[[gnu::noinline]] void chains(Matrix a, const uint8_t* page, int64_t pitch, Range k, Next& ahead, float unit,
                              Matrix c, const float* keep, int left) {
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
            f32v x = sum[r][i] * unit;
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

// Rows of a pass, and registers of columns for so many rows: sums enough that the next multiply-add need not wait for the
// last one's, and no more than there are registers for.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int DIRECT_ROWS = 4;
constexpr int registers(int) { return 4; }
#else
constexpr int DIRECT_ROWS = 6;
constexpr int registers(int rows) { return rows > 2 ? 2 : 4; }
#endif

// The first `columns` from n on, N registers of them at a time and fewer at the end.
template <class T, int R, int N>
void direct_columns(Matrix a, const uint8_t* page, int width, int columns, Range k, Ahead& ahead, float unit, Matrix c,
                    const float* keep, int n = 0) {
    for (; n < columns && (N == 1 || n + N * W <= width); n += N * W)
        chains<T, R, N>(a, page + n * CELL<T>, int64_t(width) * CELL<T>, k, ahead, unit, c.from(0, n), keep, width - n);
    if constexpr (N > 1)
        if (n < columns) direct_columns<T, R, N / 2>(a, page, width, columns, k, ahead, unit, c, keep, n);
}

template <class T>
void direct(Matrix a, int rows, const uint8_t* page, int width, int columns, Range k, Ahead& ahead, float unit,
            Matrix c, const float* keep) {
    const int passes = (rows + DIRECT_ROWS - 1) / DIRECT_ROWS;
    for (int pass = 0; pass < passes; pass++) {  // as equal as they can be
        const int r = rows * pass / passes, end = rows * (pass + 1) / passes;
        with_rows<DIRECT_ROWS>(end - r, [&](auto together) {
            constexpr int R = decltype(together)::value;
            direct_columns<T, R, registers(R)>(a.from(r), page, width, columns, k, ahead, unit, c.from(r),
                                               keep ? keep + r : nullptr);
        });
    }
}

// f(kind of number, first column, columns) for the matrices, side by side, that a page is.
template <class F>
void by_kind(const Side& side, F&& f) {
    const int width = side.is_k ? BLOCK : side.dim;
    switch (side.code) {
        case Code::BF16: return f(bf16{}, 0, width);
        case Code::FP16: return f(fp16{}, 0, width);
        case Code::FP32: return f(float{}, 0, width);
        case Code::FP8: return f(fp8{}, 0, width);
        case Code::INT8: return side.is_k ? f(Int8K{}, 0, width) : f(Int8V{}, 0, width);
        case Code::INT4:
            if (side.is_k) return f(Int4K{}, 0, width);
            f(Int4Low{}, 0, width / 2);
            f(Int4High{}, width / 2, width / 2);
    }
}

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
                const u8v quad = T::signs(load<u8v>(from + at / 4 * pitch));
                put(at, n, widen<0>(quad));
                put(at + 1, n, widen<1>(quad));
                put(at + 2, n, widen<2>(quad));
                put(at + 3, n, widen<3>(quad));
            }
        else
            for (int at = k.from; at < k.to; at++)
                put(at, n, load_float(reinterpret_cast<const T*>(from + at * pitch)));
    }
}

}  // namespace

void multiply(const Side& side, Matrix a, int rows, const uint8_t* page, Bytes next, Range tokens, Matrix c,
              const float* keep) {
    const Range k = side.is_k ? Range{0, side.dim} : tokens;
    const int passes = (rows + DIRECT_ROWS - 1) / DIRECT_ROWS * (side.code == Code::INT4 ? 2 : 1);
    const int times = std::max<int>(1, int(next.count / side.head_bytes));  // a raw page after one of codes
    Ahead ahead = {next.at, next.at + next.count, passes, times};
    by_kind(side, [&](auto kind, int first, int width) {
        direct<decltype(kind)>(a, rows, page, width, side.is_k ? tokens.to : width, k, ahead, unit(side.code),
                               c.from(0, first), keep);
    });
}

void widen_page(const Side& side, const uint8_t* page, Range k, float* tile) {
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

void multiply_panel(const Side& side, Matrix a, int rows, const float* panel, Range k, Matrix c, const float* keep) {
    Near none;
    with_rows<TILE_ROWS>(rows, [&](auto together) {
        chains<float, decltype(together)::value, TILE_REGISTERS>(a, reinterpret_cast<const uint8_t*>(panel),
                                                                 PANEL * sizeof(float), k, none, unit(side.code), c,
                                                                 keep, PANEL);
    });
}

}  // namespace octavo::ISA
