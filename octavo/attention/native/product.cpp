// Products of rows with a page; product.h says what they are.
#include "product.h"

#include <algorithm>
#include <type_traits>

#include "rows.h"

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

// Registers that there are.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

template <class T>
constexpr bool is_code = !std::is_same_v<T, bf16> && !std::is_same_v<T, fp16> && !std::is_same_v<T, float> &&
                        !std::is_same_v<T, fp8>;
template <class T>
constexpr bool is_int4 = std::is_same_v<T, Int4K> || std::is_same_v<T, Int4Low> || std::is_same_v<T, Int4High>;
template <class T>
constexpr int CELL = is_code<T> ? 4 : sizeof(T);  // bytes of a column: of one k, of codes of four

// sum += a[r, k]·page[k, ·] for the k of a range.
template <class T, int R, int N, class Next>
[[gnu::always_inline]] inline void walk(const float* a, int64_t row, const uint8_t* page, int64_t pitch, Range k,
                                        Next& ahead, f32v (&sum)[R][N]) {
    // value(i, x) makes one k's numbers of P registers of columns. Of factors and columns the fewer stay in registers.
    auto add = [&](int at, auto pair, auto&& value) __attribute__((always_inline)) {
        constexpr int P = decltype(pair)::value, COLUMNS = R < N ? P : N, FACTORS = R < N ? R : 1;
        f32v x[COLUMNS], factor[FACTORS];
#pragma GCC unroll 16
        for (int r = 0; r < R && FACTORS == R; r++) factor[r] = splat(a[r * row + at]);
#pragma GCC unroll 16
        for (int first = 0; first < N; first += COLUMNS) {
#pragma GCC unroll 16
            for (int i = 0; i < COLUMNS; i += P) value(first + i, x + i);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                if (FACTORS < R) factor[0] = splat(a[r * row + at]);
#pragma GCC unroll 16
                for (int i = 0; i < COLUMNS; i++)
                    sum[r][first + i] = fma(factor[FACTORS == R ? r : 0], x[i], sum[r][first + i]);
            }
        }
    };
    if constexpr (is_code<T>) {
        page += k.from / 4 * pitch;
        for (int at = k.from / 4 * 4; at < k.to; at += 4, page += pitch) {
            ahead.read(4 * N * W);
            u8v quad[N];
#pragma GCC unroll 16
            for (int i = 0; i < N; i++) quad[i] = T::signs(load<u8v>(page + 4 * i * W));
            // Where registers are few, codes wait in memory: else GCC keeps sums there.
            if constexpr (R * N + N > REGISTERS - 2) asm volatile("" : "+m"(quad));
            constexpr std::integral_constant<int, 1> one;
            add(at, one, [&](int i, f32v* x) { *x = widen<0>(quad[i]); });
            add(at + 1, one, [&](int i, f32v* x) { *x = widen<1>(quad[i]); });
            add(at + 2, one, [&](int i, f32v* x) { *x = widen<2>(quad[i]); });
            add(at + 3, one, [&](int i, f32v* x) { *x = widen<3>(quad[i]); });
        }
    } else {
        constexpr int PAIR = N > 1 ? 2 : 1;
        page += k.from * pitch;
        for (int at = k.from; at < k.to; at++, page += pitch) {
            ahead.read(N * W * sizeof(T));
            add(at, std::integral_constant<int, PAIR>{}, [&](int i, f32v* x) {
                const T* from = reinterpret_cast<const T*>(page) + i * W;
                if constexpr (PAIR == 2) load_pair(from, x[0], x[1]);
                else *x = load_float(from);
            });
        }
    }
}

// R rows of a and N registers of columns; cells of one k are `pitch` bytes from those of the next. Without `keep` c
// becomes the sum times `unit`, with it c·keep[r] + that. Of a last, single register (N = 1) only `left` lanes are columns. A
// function of its own, its last loops unrolled by force: else GCC keeps the sums in memory.
template <class T, int R, int N, class Next>
[[gnu::noinline]] void chains(Matrix a, const uint8_t* page, int64_t pitch, Range k, Next& next, float unit,
                              Matrix c, const float* keep, int left) {
    f32v sum[R][N] = {};
    Next ahead = next;  // in registers
    if constexpr (std::is_same_v<T, Int4K>) {
        walk<Int4Low>(a.at, a.row, page, pitch, {0, k.to / 2}, ahead, sum);
        walk<Int4High>(a.at + k.to / 2, a.row, page, pitch, {0, k.to / 2}, ahead, sum);
    } else {
        walk<T>(a.at, a.row, page, pitch, k, ahead, sum);
    }
    next = ahead;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) {
            if constexpr (N > 1)
                if (i % 2 == 0) in_order<T>(sum[r][i], sum[r][i + 1]);
            float* to = c.at + r * c.row + i * W;
            f32v x = sum[r][i] * unit;
            if (keep) x = fma(load<f32v>(to), splat(keep[r]), x);
            if (N == 1 && left < W) x = counting() < left ? x : load<f32v>(to);
            store(to, x);
        }
}

// ------------------------------------------------------------------------------------- few rows: widened in registers

// Rows of a pass, and registers of columns for so many rows: sums enough that the next multiply-add need not wait for the
// last one's, and no more than there are registers for.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int DIRECT_ROWS = 4;
constexpr int registers(int, bool) { return 4; }
#else
constexpr int DIRECT_ROWS = 6;
constexpr int registers(int rows, bool four_bits) { return rows < 3 || (rows == 3 && four_bits) ? 4 : 2; }
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
        with_constant<DIRECT_ROWS>(end - r, [&](auto together) {
            constexpr int R = decltype(together)::value;
            direct_columns<T, R, registers(R, is_int4<T>)>(a.from(r), page, width, columns, k, ahead, unit, c.from(r),
                                               keep ? keep + r : nullptr);
        });
    }
}

// f(kind of number, first column, columns) for the matrices, side by side, that a page is.
template <class F>
void by_kind(const Side& side, F&& f) {
    const int width = side.is_k ? BLOCK : side.dim;
    if (!is_integer(side.code)) return with_number(side.code, [&](auto number) { f(number, 0, width); });
    if (side.code == Code::INT8) return side.is_k ? f(Int8K{}, 0, width) : f(Int8V{}, 0, width);
    if (side.is_k) return f(Int4K{}, 0, width);
    f(Int4Low{}, 0, width / 2);
    f(Int4High{}, width / 2, width / 2);
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
    Ahead ahead(next, side.head_bytes * (side.is_k ? tokens.to : tokens.to - tokens.from) / BLOCK);
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
    with_constant<TILE_ROWS>(rows, [&](auto together) {
        chains<float, decltype(together)::value, TILE_REGISTERS>(a, reinterpret_cast<const uint8_t*>(panel),
                                                                 PANEL * sizeof(float), k, none, unit(side.code), c,
                                                                 keep, PANEL);
    });
}

}  // namespace octavo::ISA
