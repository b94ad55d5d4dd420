// Products of rows with a page of integer codes; integer.h says what they are.
#include "integer.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace octavo::ISA {
namespace {

constexpr float QUERY_STEPS = 16256;    // 128·127
constexpr float WEIGHT_STEPS = 65534;   // 16 bits, and room for what is added

// What is added before a weight is cut to an integer: not ½ for each, but spread evenly over [0, 1) along the page. A tail
// of equal weights below ½ would vanish together; so, their share of it is rounded up and the sum is kept.
constexpr struct Dither {
    alignas(64) float of[BLOCK];
    constexpr Dither() : of() {
        for (int t = 0; t < BLOCK; t++) {
            const double x = (t + 0.5) * 0.6180339887498949;  // the golden ratio: no two neighbours alike
            of[t] = float(x - int(x));
        }
    }
} DITHER;

// The loops below are functions of their own, and their last loops are unrolled by force: else GCC keeps the accumulators
// in memory.

// c = scores, products of R queries with a page of K.
template <bool FOUR, int R>
[[gnu::noinline]] void scores(const uint8_t* page, Ahead& ahead, const IntegerRow* rows, int dim, Matrix c) {
    const int groups = dim / 4 / (FOUR ? 2 : 1), half = dim / 2;
    for (int t = 0; t < BLOCK; t += PASS * W) {
        i32v high[R][PASS] = {}, low[R][PASS] = {};
        for (int g = 0; g < groups; g++) {
            ahead.read(4 * PASS * W);
            for (int i = 0; i < PASS; i++) {
                const u8v codes = load<u8v>(page + (int64_t(g) * BLOCK + t + i * W) * 4);
                auto dot = [&](u8v part, int d) __attribute__((always_inline)) {
                    for (int r = 0; r < R; r++) {
                        high[r][i] = dot4(high[r][i], part, splat4(rows[r].high + d));
                        low[r][i] = dot4(low[r][i], part, splat4(rows[r].low + d));
                    }
                };
                dot(FOUR ? codes & (uint8_t)15 : codes, 4 * g);
                if constexpr (FOUR) dot((u8v)((u32v)codes >> 4) & (uint8_t)15, half + 4 * g);
            }
        }
        for (int r = 0; r < R; r++) {
            const float center = rows[r].sum * (FOUR ? 7.5f : 128.0f);
            for (int i = 0; i < PASS; i++)
                store(c.at + r * c.row + t + i * W, (to_float((high[r][i] << 7) + low[r][i]) - center) * rows[r].step);
        }
    }
}

// c = c·keep + x. Of a last, single register (N = 1) only `left` lanes are the row's: the others are of the next row.
template <int N>
inline void add_to(float* c, float keep, int left, f32v x) {
    const f32v before = load<f32v>(c);
    x = fma(before, splat(keep), x);
    if constexpr (N == 1) x = counting() < left ? x : before;
    store(c, x);
}

// c = c·keep + sums of values, of R rows of weights over a page of V: N registers of channels from d on.
template <bool FOUR, int R, int N>
[[gnu::noinline]] void sums_of(const uint8_t* page, Ahead& ahead, const IntegerRow* rows, int width, int d, Range tokens,
                               Matrix c, const float* keep) {
    constexpr int PARTS = FOUR ? 2 : 1;  // channels d and d + width share a byte
    i32v high[R][PARTS * N] = {}, low[R][PARTS * N] = {};
    for (int t = tokens.from / 4; 4 * t < tokens.to; t++) {
        ahead.read(4 * N * W);
        for (int i = 0; i < N; i++) {
            const u8v codes = load<u8v>(page + (int64_t(t) * width + d + i * W) * 4);
            auto dot = [&](u8v part, int n) __attribute__((always_inline)) {
                for (int r = 0; r < R; r++) {
                    high[r][n] = dot4(high[r][n], splat4(rows[r].high + 4 * t), part);
                    low[r][n] = dot4(low[r][n], splat4(rows[r].low + 4 * t), part);
                }
            };
            dot(FOUR ? codes & (uint8_t)15 : codes, i);
            // The high half stays where it is, signed: 16·(code − 8).
            if constexpr (FOUR) dot((codes & (uint8_t)240) ^ (uint8_t)128, N + i);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const float step = rows[r].step, sum = rows[r].sum * step;
        float* to = c.at + r * c.row + d;
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            const f32v first = to_float((high[r][i] << 8) + low[r][i]) * step;
            add_to<N>(to + i * W, keep[r], width - d, FOUR ? first - 7.5f * sum : first);
            if constexpr (FOUR) {
                const f32v second = to_float((high[r][N + i] << 8) + low[r][N + i]) * (step / 16) + 0.5f * sum;
                add_to<N>(to + width + i * W, keep[r], width - d, second);
            }
        }
    }
}

template <bool FOUR, int R>
void sums(const uint8_t* page, Ahead& ahead, const IntegerRow* rows, int dim, Range tokens, Matrix c, const float* keep) {
    constexpr int MOST = FOUR ? PASS / 2 : PASS;
    const int width = FOUR ? dim / 2 : dim;
    int d = 0;
    for (; d + MOST * W <= width; d += MOST * W) sums_of<FOUR, R, MOST>(page, ahead, rows, width, d, tokens, c, keep);
    for (; d < width; d += W) sums_of<FOUR, R, 1>(page, ahead, rows, width, d, tokens, c, keep);
}

// Calls f(first, R) for all rows, R at a time: MOST, and for the rest half as many, and so on.
template <int MOST, class F>
void by_rows(int from, int rows, F&& f) {
    for (; from + MOST <= rows; from += MOST) f(from, std::integral_constant<int, MOST>{});
    if constexpr (MOST > 1) by_rows<MOST / 2>(from, rows, f);
}

}  // namespace

void round_query(const float* q, int dim, IntegerRow& row) {
    f32v most = {};
    for (int d = 0; d < dim; d += W) most = max(abs(load<f32v>(q + d)), most);
    const float largest = max(most);
    row.step = largest > 0 ? largest / QUERY_STEPS : 1.0f;
    const float inverse = std::min(1.0f / row.step, std::numeric_limits<float>::max());
    f32v sum_of = {};
    for (int d = 0; d < dim; d += W) {
        const i32v value = nearest(load<f32v>(q + d) * inverse), upper = (value + 64) >> 7;
        store_bytes(row.high + d, upper);
        store_bytes(row.low + d, value - (upper << 7));
        sum_of += to_float(value);
    }
    row.sum = sum(sum_of);
}

void round_weights(const float* weights, IntegerRow& row) {
    f32v most = {};
    for (int t = 0; t < BLOCK; t += W) most = max(load<f32v>(weights + t), most);
    const float largest = std::max(max(most), 1e-30f);  // a floor keeps what is no number from becoming infinite
    const float inverse = WEIGHT_STEPS / largest;
    row.step = largest / WEIGHT_STEPS;
    i32v sum_of = {};
    for (int t = 0; t < BLOCK; t += W) {
        const i32v value = __builtin_convertvector(load<f32v>(weights + t) * inverse + load<f32v>(DITHER.of + t), i32v);
        sum_of += value;
        store_bytes(row.high + t, value >> 8);
        store_bytes(row.low + t, value);
    }
    row.sum = sum(to_float(sum_of));
}

void multiply(const Side& side, const IntegerRow* rows, int count, const uint8_t* page, Bytes next, Range tokens, Matrix c,
              const float* keep) {
    const int passes = count / ROWS + std::popcount(unsigned(count % ROWS));
    Ahead ahead(next, passes * side.head_bytes);
    by_rows<ROWS>(0, count, [&](int first, auto together) {
        constexpr int R = decltype(together)::value;
        auto pass = [&](auto four) {
            constexpr bool FOUR = decltype(four)::value;
            if (side.is_k) scores<FOUR, R>(page, ahead, rows + first, side.dim, c.from(first));
            else sums<FOUR, R>(page, ahead, rows + first, side.dim, tokens, c.from(first), keep + first);
        };
        if (side.code == Code::INT4) pass(std::true_type{});
        else pass(std::false_type{});
    });
}

}  // namespace octavo::ISA
