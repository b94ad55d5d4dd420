// The kernels: encode and write, attention on codes, read back. Compiled once for each instruction set (see CMakeLists.txt
// and simd.h); nothing here is called before module.cpp has looked at the processor.
//
// Attention on codes, of one query row and one block of 64 tokens:
//
//     scores    the query as two int8 (15 bits, relative to its own largest value) times the codes, in int32
//     softmax   relative to the block's own maximum, so that a strong first token does not push the tail into zeros
//     sum       the weights p·s as two uint8 (16 bits, relative to their own largest) times the codes, in int32
//
// and the blocks are joined in float by exp(m_block − m).
#include "kernel.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace octavo::ISA {
namespace {

constexpr float NOTHING = -1e30f;  // maximum of a row that has seen nothing: finite, so that differences are not NaN
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;
constexpr int64_t INLINE_BLOCKS = 32;  // of one query row: fewer are not worth waking a thread for
constexpr int64_t UNIT_BLOCKS = 8;  // fewest blocks of a piece of a split context
constexpr int UNITS_A_THREAD = 6;  // pieces for each thread to balance with

inline int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

template <class F>
void with_float(Float type, F&& f) {
    if (type == Float::BF16) f(bf16{});
    else if (type == Float::FP16) f(fp16{});
    else f(float{});
}

// A row as floats: out[dim], and zeros to a whole number of registers.
void widen(const Rows& x, int64_t token, int head, int dim, float* out) {
    with_float(x.type, [&](auto type) {
        const auto* in = static_cast<const decltype(type)*>(x.data) + token * x.token_stride + head * x.head_stride;
        int d = 0;
        for (; d + W <= dim; d += W) store(out + d, load_float(in + d));
        for (; d < dim; d++) out[d] = to_float(in[d]);
        for (; d % W; d++) out[d] = 0;
    });
}

template <int HALF>
void butterfly(float* x, int dim) {  // lanes i and i ^ HALF of each register become their sum and their difference
    const f32v own = (counting() & HALF) != 0 ? splat(-1.0f) : splat(1.0f);
    for (int i = 0; i < dim; i += W) store(x + i, load<f32v>(x + i) * own + swapped<HALF>(load<f32v>(x + i)));
}

// Orthonormal Hadamard transform of the largest power of two that divides dim, block by block; its own inverse.
void rotate(float* x, int dim) {
    const int size = dim & -dim;
    butterfly<1>(x, dim);
    butterfly<2>(x, dim);
    if constexpr (W > 4) butterfly<4>(x, dim);  // dim is a multiple of 8
    if constexpr (W > 8) {
        if (size > 8) butterfly<8>(x, dim);
    }
    for (int half = W; half < size; half *= 2)
        for (int i = 0; i < dim; i += 2 * half)
            for (int j = i; j < i + half; j += W) {
                const f32v a = load<f32v>(x + j), b = load<f32v>(x + j + half);
                store(x + j, a + b);
                store(x + j + half, a - b);
            }
    const float scale = float(1.0 / std::sqrt(double(size)));  // as the specification rounds it
    for (int i = 0; i < dim; i += W) store(x + i, load<f32v>(x + i) * scale);
}

// ---------------------------------------------------------------------------------------------------------- writing

// Codes of y[dim] times `factor`; returns how many values lie beyond `limit`. A NaN becomes the lowest code.
int encode_int8(const float* y, int dim, float factor, float limit, uint8_t* code) {
    i32v beyond = {};
    for (int d = 0; d < dim; d += W) {
        const f32v x = load<f32v>(y + d) * factor;
        beyond -= abs(x) > limit;
        store_bytes(code + d, nearest(min(max(x, splat(-128.0f)), splat(127.0f))));
    }
    return int(sum(to_float(beyond)));
}

int encode_int4(const float* y, int dim, float factor, float limit, uint8_t* code) {
    i32v beyond = {};
    for (int d = 0; d < dim; d += W) {
        const f32v x = load<f32v>(y + d) * factor, bounded = min(max(x, splat(-8.0f)), splat(7.0f));
        beyond -= abs(x) > limit;
        i32v floor = __builtin_convertvector(bounded, i32v);
        floor += to_float(floor) > bounded;
        store_bytes(code + d, floor + 8);
    }
    return int(sum(to_float(beyond)));
}

// Codes of one row, y[dim] and zeros to a whole number of registers; returns how many values were out of range.
int encode(const Side& side, float* y, uint8_t* code, uint8_t* scale_index) {
    const int dim = side.dim;
    if (side.rotated) rotate(y, dim);
    if (!side.scales) return encode_int8(y, dim, 1.0f, 128.5f, code);
    f32v largest = {};
    for (int d = 0; d < dim; d += W) largest = max(abs(load<f32v>(y + d)), largest);
    *scale_index = uint8_t(std::lower_bound(side.token_limit, side.token_limit + 255, max(largest)) - side.token_limit);
    const float reciprocal = side.token_reciprocal[*scale_index];
    if (side.code == Code::INT8) return encode_int8(y, dim, reciprocal, 127.5f, code);
    return encode_int4(y, dim, reciprocal, 8.5f, code);
}

// Put the codes of one row into its place of a block.
void place(const Side& side, uint8_t* block, int token, uint8_t* code) {
    int width = side.dim;
    if (side.code == Code::INT4) {
        width /= 2;
        for (int d = 0; d < width; d++) code[d] |= code[d + width] << 4;
    } else if (side.is_k) {
        for (int d = 0; d < width; d++) code[d] ^= 128;
    }
    if (side.is_k)
        for (int d = 0; d < width; d += 4) std::memcpy(block + (int64_t(d) * BLOCK / 4 + token) * 4, code + d, 4);
    else
        for (int d = 0; d < width; d++) block[(int64_t(token / 4) * width + d) * 4 + token % 4] = code[d];
}

template <class T>
void place_raw(const Side& side, uint8_t* block, int token, const float* y) {
    T* values = reinterpret_cast<T*>(block);
    for (int d = 0; d < side.dim; d++)
        from_float(y[d], values[side.is_k ? int64_t(d) * BLOCK + token : int64_t(token) * side.dim + d]);
}

void write(const Side& side, const Rows& x, const int64_t* slots, int64_t tokens, const Pool& pool) {
    constexpr int64_t PIECE = 16;  // rows of one head: a few microseconds
    const int64_t pieces = (tokens + PIECE - 1) / PIECE;
    std::atomic<int64_t> saturated{0};
    parallel(pool, pieces * side.heads, tokens * side.heads * side.dim >= 1 << 15, [&](int64_t item) {
        const int head = int(item % side.heads);
        thread_local std::vector<float> row;
        thread_local std::vector<uint8_t> code;
        row.resize(padded(side.dim));
        code.resize(padded(side.dim));
        int64_t out_of_range = 0;
        const int64_t first = item / side.heads * PIECE;
        for (int64_t t = first; t < std::min(first + PIECE, tokens); t++) {
            if (slots[t] < 0) continue;  // write nowhere
            const int64_t cell = slots[t] / BLOCK * side.heads + head;
            uint8_t* block = side.codes + cell * side.head_bytes;
            const int token = int(slots[t] % BLOCK);
            widen(x, t, head, side.dim, row.data());
            if (side.code == Code::BF16) { place_raw<bf16>(side, block, token, row.data()); continue; }
            if (side.code == Code::FP16) { place_raw<fp16>(side, block, token, row.data()); continue; }
            if (side.code == Code::FP32) { place_raw<float>(side, block, token, row.data()); continue; }
            if (side.mu)
                for (int d = 0; d < side.dim; d++)
                    row[d] = (row[d] - side.mu[head * side.dim + d]) * side.reciprocal[head * side.dim + d];
            uint8_t index = 0;
            out_of_range += encode(side, row.data(), code.data(), &index);
            place(side, block, token, code.data());
            if (side.scales) side.scales[cell * BLOCK + token] = index;
        }
        if (out_of_range) saturated.fetch_add(out_of_range, std::memory_order_relaxed);
    });
    *side.saturated += saturated;
}

// ------------------------------------------------------------------------------------------------- attention on codes

// A weighted sum of V codes with a running softmax: out = Σ 2^(score − top)·code, total = Σ 2^(score − top).
struct Sum {
    float top, total;
    alignas(64) float out[LARGEST + W];  // a register may begin at the last values
};

// One query row on its way over the blocks of one head.
struct Row {
    // The query, folded: scale·R(q ∘ c), and for codes as two bytes: real ≈ step·(128·high + low).
    alignas(64) float real[LARGEST];
    alignas(64) int8_t high[LARGEST];
    alignas(64) int8_t low[LARGEST];
    float step, shift, sum;  // shift: q·mu; sum: Σ(128·high + low)
    // The block: scores, which become weights, for codes as two bytes: weight ≈ weight_step·(256·high + low).
    alignas(64) float weight[BLOCK];
    alignas(64) uint8_t weight_high[BLOCK];
    alignas(64) uint8_t weight_low[BLOCK];
    float weight_step, weight_sum;  // weight_sum: Σ(256·high + low)
    float factor;  // of the block's sum: 2^(its top − top)
    Sum so_far;
};

inline bool is_integer(const Side& side) { return side.code == Code::INT8 || side.code == Code::INT4; }

void prepare(Row& row, const Side& k, const Attention& attention, int head) {
    float* q = row.real;
    const int dim = k.dim;
    for (int d = 0; d < dim; d++) q[d] *= attention.scale;
    row.shift = 0;
    if (k.mu) {
        const float *mu = k.mu + int64_t(head) * dim, *c = k.c + int64_t(head) * dim;
        // q·mu is the same for every key: plain softmax drops it, a soft cap and a sink do not.
        if (attention.softcap || attention.sinks)
            for (int d = 0; d < dim; d++) row.shift += q[d] * mu[d];
        for (int d = 0; d < dim; d++) q[d] *= c[d];
    }
    if (k.rotated) rotate(q, dim);
    if (!is_integer(k)) return;
    f32v most = {};
    for (int d = 0; d < dim; d += W) most = max(abs(load<f32v>(q + d)), most);
    const float largest = max(most);
    constexpr float STEPS = 16256;  // 128·127
    row.step = largest > 0 ? largest / STEPS : 1.0f;
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

// The next block, asked for at the pace at which this one is read: a burst would only queue, and leave the memory idle
// in between. All query rows share the pace, in `passes` of some rows each.
struct Ahead {
    const uint8_t *at, *end;
    int passes;
    void read(int bytes) {
        for (; bytes > 0 && at < end; bytes -= 64 * passes, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

struct Seen {  // tokens [from, to) of a block
    int from, to;
};

// The loops below are functions of their own, and their last loops are unrolled by force: else GCC keeps the accumulators
// in memory.

// row.weight = scores, integer dot products of R queries with a block of K codes.
template <bool FOUR, int R>
[[gnu::noinline]] void dot_codes(const uint8_t* block, Ahead& ahead, Row* rows, int dim) {
    const int groups = dim / 4 / (FOUR ? 2 : 1), half = dim / 2;
    for (int t = 0; t < BLOCK; t += PASS * W) {
        i32v high[R][PASS] = {}, low[R][PASS] = {};
        for (int g = 0; g < groups; g++) {
            ahead.read(4 * PASS * W);
            for (int i = 0; i < PASS; i++) {
                const u8v codes = load<u8v>(block + (int64_t(g) * BLOCK + t + i * W) * 4);
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
                store(rows[r].weight + t + i * W, (to_float((high[r][i] << 7) + low[r][i]) - center) * rows[r].step);
        }
    }
}

template <class T, int R>
[[gnu::noinline]] void dot_raw(const uint8_t* block, Ahead& ahead, Row* rows, int dim) {
    const T* keys = reinterpret_cast<const T*>(block);
    for (int t = 0; t < BLOCK; t += PASS * W) {
        f32v sum[R][PASS] = {};
        for (int d = 0; d < dim; d++) {
            ahead.read(PASS * W * sizeof(T));
            for (int i = 0; i < PASS; i++) {
                const f32v k = load_float(keys + int64_t(d) * BLOCK + t + i * W);
                for (int r = 0; r < R; r++) sum[r][i] += k * rows[r].real[d];
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < PASS; i++) store(rows[r].weight + t + i * W, sum[r][i]);
    }
}

// out[0 … W) += x. Of a last, single register (N = 1) only `left` lanes are the row's: the others are of the next row.
template <int N>
inline void add_to(float* out, int left, f32v x) {
    if constexpr (N == 1) x = counting() < left ? x : f32v{};
    store(out, load<f32v>(out) + x);
}

// R rows over a block of V codes, N registers of channels from d on.
template <bool FOUR, int R, int N>
[[gnu::noinline]] void add_codes_pass(const uint8_t* block, Ahead& ahead, Row* rows, int width, int d) {
    constexpr int PARTS = FOUR ? 2 : 1;  // channels d and d + width share a byte
    i32v high[R][PARTS * N] = {}, low[R][PARTS * N] = {};
    for (int t = 0; t < BLOCK / 4; t++) {
        ahead.read(4 * N * W);
        for (int i = 0; i < N; i++) {
            const u8v codes = load<u8v>(block + (int64_t(t) * width + d + i * W) * 4);
            auto dot = [&](u8v part, int n) __attribute__((always_inline)) {
                for (int r = 0; r < R; r++) {
                    high[r][n] = dot4(high[r][n], splat4(rows[r].weight_high + 4 * t), part);
                    low[r][n] = dot4(low[r][n], splat4(rows[r].weight_low + 4 * t), part);
                }
            };
            dot(FOUR ? codes & (uint8_t)15 : codes, i);
            // The high half stays where it is, signed: 16·(code − 8).
            if constexpr (FOUR) dot((codes & (uint8_t)240) ^ (uint8_t)128, N + i);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const float factor = rows[r].factor * rows[r].weight_step, sum = rows[r].weight_sum * factor;
        float* out = rows[r].so_far.out + d;
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            const f32v first = to_float((high[r][i] << 8) + low[r][i]) * factor;
            add_to<N>(out + i * W, width - d, FOUR ? first - 7.5f * sum : first);
            if constexpr (FOUR) {
                const f32v second = to_float((high[r][N + i] << 8) + low[r][N + i]) * (factor / 16) + 0.5f * sum;
                add_to<N>(out + width + i * W, width - d, second);
            }
        }
    }
}

template <bool FOUR, int R>
void add_codes(const uint8_t* block, Ahead& ahead, Row* rows, int dim) {
    constexpr int MOST = FOUR ? PASS / 2 : PASS;
    const int width = FOUR ? dim / 2 : dim;
    int d = 0;
    for (; d + MOST * W <= width; d += MOST * W) add_codes_pass<FOUR, R, MOST>(block, ahead, rows, width, d);
    for (; d < width; d += W) add_codes_pass<FOUR, R, 1>(block, ahead, rows, width, d);
}

// Only of tokens that are seen: the rest of a block is its last owner's, and a weight of 0 does not undo a NaN.
template <class T, int R, int N>
[[gnu::noinline]] void add_raw_pass(const uint8_t* block, Ahead& ahead, Row* rows, int dim, Seen seen, int d) {
    const T* values = reinterpret_cast<const T*>(block);
    f32v sum[R][N] = {};
    for (int t = seen.from; t < seen.to; t++) {
        ahead.read(N * W * sizeof(T));
        for (int i = 0; i < N; i++) {
            const f32v v = load_float(values + int64_t(t) * dim + d + i * W);
            for (int r = 0; r < R; r++) sum[r][i] += v * rows[r].weight[t];
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++)
            add_to<N>(rows[r].so_far.out + d + i * W, dim - d, sum[r][i] * rows[r].factor);
}

template <class T, int R>
void add_raw(const uint8_t* block, Ahead& ahead, Row* rows, int dim, Seen seen) {
    int d = 0;
    for (; d + PASS * W <= dim; d += PASS * W) add_raw_pass<T, R, PASS>(block, ahead, rows, dim, seen, d);
    for (; d < dim; d += W) add_raw_pass<T, R, 1>(block, ahead, rows, dim, seen, d);
}

// Calls f(first, R) for all rows, R at a time: MOST, and for the rest half as many, and so on.
template <int MOST, class F>
void by_rows(int from, int rows, F&& f) {
    for (; from + MOST <= rows; from += MOST) f(from, std::integral_constant<int, MOST>{});
    if constexpr (MOST > 1) by_rows<MOST / 2>(from, rows, f);
}

// Calls work(type, R, first, ahead) for all rows of one block, as many at a time as there are registers for: floats need
// one accumulator where codes need two. `type` is that of the values; of codes it says whether they have four bits.
template <class F>
void over_block(const Side& side, const uint8_t* next, int rows, F&& work) {
    auto grouped = [&](auto type, auto most) {
        constexpr int MOST = decltype(most)::value;
        Ahead ahead = {next, next + side.head_bytes, rows / MOST + std::popcount(unsigned(rows % MOST))};
        by_rows<MOST>(0, rows, [&](int first, auto together) { work(type, together, first, ahead); });
    };
    constexpr std::integral_constant<int, ROWS> codes;
    constexpr std::integral_constant<int, 2 * ROWS> floats;
    switch (side.code) {
        case Code::BF16: return grouped(bf16{}, floats);
        case Code::FP16: return grouped(fp16{}, floats);
        case Code::FP32: return grouped(float{}, floats);
        case Code::INT8: return grouped(std::false_type{}, codes);
        case Code::INT4: return grouped(std::true_type{}, codes);
    }
}

void scores_of(const Side& k, const uint8_t* block, const uint8_t* next, Row* rows, int count) {
    over_block(k, next, count, [&](auto type, auto together, int first, Ahead& ahead) {
        using T = decltype(type);
        constexpr int R = decltype(together)::value;
        if constexpr (requires { T::value; }) dot_codes<T::value, R>(block, ahead, rows + first, k.dim);
        else dot_raw<T, R>(block, ahead, rows + first, k.dim);
    });
}

void add_values(const Side& v, const uint8_t* block, const uint8_t* next, Row* rows, int count, Seen seen) {
    over_block(v, next, count, [&](auto type, auto together, int first, Ahead& ahead) {
        using T = decltype(type);
        constexpr int R = decltype(together)::value;
        if constexpr (requires { T::value; }) add_codes<T::value, R>(block, ahead, rows + first, v.dim);
        else add_raw<T, R>(block, ahead, rows + first, v.dim, seen);
    });
}

// cap·tanh(s/cap), by tanh|x| = (1 − e^−2|x|)/(1 + e^−2|x|).
inline f32v softcap(f32v s, float cap) {
    const f32v e = exp2(abs(s) * (-2.0f * LOG2E / cap)), capped = (1.0f - e) / (1.0f + e) * cap;
    return s < 0.0f ? -capped : capped;
}

// What is added before a weight is cut to an integer: not ½ for each, but spread evenly over [0, 1) along the block. A
// tail of equal weights below ½ would vanish together; so, their share of it is rounded up and the sum is kept.
constexpr struct Dither {
    alignas(64) float of[BLOCK];
    constexpr Dither() : of() {
        for (int t = 0; t < BLOCK; t++) {
            const double x = (t + 0.5) * 0.6180339887498949;  // the golden ratio: no two neighbours alike
            of[t] = float(x - int(x));
        }
    }
} DITHER;

// The scores of a block become weights relative to the block's own maximum.
[[gnu::noinline]] void soften(Row& row, const Attention& attention, const float* k_scale, const float* v_scale,
                              Seen seen, const Side& v) {
    constexpr int N = BLOCK / W;  // the whole block stays in registers
    f32v s[N];
    for (int i = 0; i < N; i++) {
        s[i] = load<f32v>(row.weight + i * W);
        if (k_scale) s[i] *= load<f32v>(k_scale + i * W);
    }
    if (attention.softcap || attention.sinks)
        for (int i = 0; i < N; i++) s[i] += row.shift;
    if (attention.softcap)
        for (int i = 0; i < N; i++) s[i] = softcap(s[i], attention.softcap);
    if (seen.from > 0 || seen.to < BLOCK)
        for (int i = 0; i < N; i++) {
            const i32v token = counting() + i * W;
            s[i] = (token >= seen.from) & (token < seen.to) ? s[i] : splat(-INFINITE);
        }
    f32v most = s[0];
    for (int i = 1; i < N; i++) most = max(s[i], most);
    const float top = std::max(max(most), NOTHING);
    f32v total = {}, largest = {};
    for (int i = 0; i < N; i++) {
        s[i] = exp2(s[i] - top);
        total += s[i];
        if (v_scale) s[i] *= load<f32v>(v_scale + i * W);
        largest = max(s[i], largest);
    }

    Sum& so_far = row.so_far;
    row.factor = top > NOTHING;
    if (top <= so_far.top) {
        row.factor *= exp2(splat(top - so_far.top))[0];
    } else {  // a new maximum: what was summed so far is relative to the old one
        const float keep = exp2(splat(so_far.top - top))[0];
        so_far.top = top;
        so_far.total *= keep;
        for (int d = 0; d < v.dim; d += W) store(so_far.out + d, load<f32v>(so_far.out + d) * keep);
    }
    so_far.total += sum(total) * row.factor;

    if (!is_integer(v)) {
        for (int i = 0; i < N; i++) store(row.weight + i * W, s[i]);
        return;
    }
    // The best token's own weight is 1; where no score is a number, a floor keeps the rest from becoming infinite.
    const float peak = v_scale ? std::max(max(largest), 1e-30f) : 1.0f;
    constexpr float STEPS = 65534;  // 16 bits, and room for what is added
    const float inverse = STEPS / peak;
    row.weight_step = peak / STEPS;
    u32v weights = {};
    for (int i = 0; i < N; i++) {
        const i32v value = __builtin_convertvector(s[i] * inverse + load<f32v>(DITHER.of + i * W), i32v);
        weights += (u32v)value;
        store_bytes(row.weight_high + i * W, value >> 8);
        store_bytes(row.weight_low + i * W, value);
    }
    row.weight_sum = v.code == Code::INT4 ? sum(to_float((i32v)weights)) : 0.0f;
}

// Some blocks of one sequence and one KV head, for all query heads that share them.
struct Unit {
    int sequence, head;
    int64_t first, last;  // blocks
    int64_t piece, pieces;  // which of how many of its sequence and head
    int64_t sums;  // where their rows' sums stand, if there are more than one
};

// The oldest token that a sequence's newest, of `kv_len`, sees.
inline int64_t first_seen(const Attention& attention, int64_t kv_len) {
    return attention.window ? std::max<int64_t>(0, kv_len - attention.window) : 0;
}

void attend_unit(const Unit& unit, const Side& k, const Side& v, const Attention& attention, const Step& step,
                 const Rows& q, std::vector<Row>& rows) {
    const int group = attention.heads / k.heads;
    const int64_t* table = step.table + unit.sequence * step.table_width;
    const int64_t end = step.kv_len[unit.sequence], begin = first_seen(attention, end);
    for (int r = 0; r < group; r++) {
        Row& row = rows[r];
        widen(q, step.row[unit.sequence], unit.head * group + r, k.dim, row.real);
        prepare(row, k, attention, unit.head);
        row.so_far.top = NOTHING;
        row.so_far.total = 0;
        std::fill_n(row.so_far.out, padded(v.dim), 0.0f);
    }
    for (int64_t b = unit.first; b < unit.last; b++) {
        const int64_t cell = table[b] * k.heads + unit.head;
        const int64_t next = (b + 1 < unit.last ? table[b + 1] : table[b]) * k.heads + unit.head;
        alignas(64) float k_scale[BLOCK], v_scale[BLOCK];
        auto scales = [&](const Side& side, float* out) -> const float* {
            if (!side.scales) return nullptr;
            __builtin_prefetch(side.scales + next * BLOCK, 0, 3);
            for (int t = 0; t < BLOCK; t += W) store(out + t, look_up(side.token_scale, side.scales + cell * BLOCK + t));
            return out;
        };
        const float *k_scales = scales(k, k_scale), *v_scales = scales(v, v_scale);
        const Seen seen = {int(std::max<int64_t>(begin - b * BLOCK, 0)), int(std::min<int64_t>(end - b * BLOCK, BLOCK))};
        scores_of(k, k.codes + cell * k.head_bytes, k.codes + next * k.head_bytes, rows.data(), group);
        for (int r = 0; r < group; r++) soften(rows[r], attention, k_scales, v_scales, seen, v);
        add_values(v, v.codes + cell * v.head_bytes, v.codes + next * v.head_bytes, rows.data(), group, seen);
    }
}

// Join the pieces of a row, divide, undo the rotation and the static part of V, and store.
template <class T>
void finish(Sum* pieces, int64_t count, int64_t stride, const Side& v, const Attention& attention, int query_head,
            int head, T* out) {
    Sum& whole = pieces[0];
    for (int64_t i = 1; i < count; i++) {
        const Sum& piece = pieces[i * stride];
        const float top = std::max(whole.top, piece.top);
        const float own = std::exp2(whole.top - top), other = std::exp2(piece.top - top);
        whole.top = top;
        whole.total = whole.total * own + piece.total * other;
        for (int d = 0; d < v.dim; d += W)
            store(whole.out + d, load<f32v>(whole.out + d) * own + load<f32v>(piece.out + d) * other);
    }
    float denominator = whole.total;
    if (attention.sinks) denominator += std::exp2(attention.sinks[query_head] * LOG2E - whole.top);
    // A row that saw nothing is 0, not 0/0.
    const float share = 1.0f / std::max(denominator, std::numeric_limits<float>::min()), weight = whole.total * share;
    float* x = whole.out;
    for (int d = 0; d < v.dim; d++) x[d] *= share;
    if (v.rotated) rotate(x, v.dim);
    if (v.mu) {
        const float *mu = v.mu + int64_t(head) * v.dim, *c = v.c + int64_t(head) * v.dim;
        for (int d = 0; d < v.dim; d++) x[d] = x[d] * c[d] + weight * mu[d];
    }
    for (int d = 0; d < v.dim; d++) from_float(x[d], out[d]);
}

void decode(const Side& k, const Side& v, const Attention& natural, const Step& step, const Rows& q, void* out,
            const Pool& pool) {
    Attention attention = natural;  // scores in bits: weights are powers of two
    attention.scale *= LOG2E;
    attention.softcap *= LOG2E;
    const int group = attention.heads / k.heads;
    auto first_block = [&](int s) { return first_seen(attention, step.kv_len[s]) / BLOCK; };
    auto end_block = [&](int s) { return (step.kv_len[s] + BLOCK - 1) / BLOCK; };
    int64_t blocks = 0;
    for (int s = 0; s < step.sequences; s++) blocks += (end_block(s) - first_block(s)) * k.heads;
    const bool worth_it = blocks * group > INLINE_BLOCKS;
    const int64_t most =
        worth_it ? std::max(UNIT_BLOCKS, blocks / (int64_t(pool.threads) * UNITS_A_THREAD)) : blocks + 1;

    std::vector<Unit> units;
    units.reserve(step.sequences * k.heads);
    int64_t split_rows = 0;
    for (int s = 0; s < step.sequences; s++)
        for (int h = 0; h < k.heads; h++) {
            const int64_t begin = first_block(s), blocks = end_block(s) - begin;
            const int64_t pieces = std::max<int64_t>(1, (blocks + most - 1) / most);
            for (int64_t i = 0; i < pieces; i++)
                units.push_back({s, h, begin + blocks * i / pieces, begin + blocks * (i + 1) / pieces, i, pieces,
                                 split_rows});
            if (pieces > 1) split_rows += pieces * group;
        }
    std::vector<Sum> sums(split_rows);

    auto finish_row = [&](const Unit& unit, int r, Sum* pieces) {
        const int query_head = unit.head * group + r;
        with_float(q.type, [&](auto type) {
            auto* to = static_cast<decltype(type)*>(out) + (step.row[unit.sequence] * attention.heads + query_head) * v.dim;
            finish(pieces, unit.pieces, group, v, attention, query_head, unit.head, to);
        });
    };
    parallel(pool, int64_t(units.size()), worth_it, [&](int64_t i) {
        thread_local std::vector<Row> rows;
        if (int(rows.size()) < group) rows.resize(group);
        const Unit& unit = units[i];
        attend_unit(unit, k, v, attention, step, q, rows);
        for (int r = 0; r < group; r++) {
            if (unit.pieces == 1) finish_row(unit, r, &rows[r].so_far);
            else sums[unit.sums + unit.piece * group + r] = rows[r].so_far;
        }
    });
    for (const Unit& unit : units)
        if (unit.pieces > 1 && unit.piece == 0)
            for (int r = 0; r < group; r++) finish_row(unit, r, &sums[unit.sums + r]);
}

// ---------------------------------------------------------------------------------------------------------- reading

// The centered codes of one token: row[dim].
void unpack(const Side& side, const uint8_t* block, int token, float* row) {
    auto raw = [&](auto type) {
        const auto* values = reinterpret_cast<const decltype(type)*>(block);
        for (int d = 0; d < side.dim; d++)
            row[d] = to_float(values[side.is_k ? int64_t(d) * BLOCK + token : int64_t(token) * side.dim + d]);
    };
    if (side.code == Code::BF16) return raw(bf16{});
    if (side.code == Code::FP16) return raw(fp16{});
    if (side.code == Code::FP32) return raw(float{});
    const int width = side.code == Code::INT4 ? side.dim / 2 : side.dim;
    const uint8_t* first = side.is_k ? block + token * 4 : block + int64_t(token / 4) * width * 4 + token % 4;
    for (int d = 0; d < width; d++) {
        const uint8_t byte = side.is_k ? first[int64_t(d / 4) * BLOCK * 4 + d % 4] : first[int64_t(d) * 4];
        if (side.code == Code::INT4) {
            row[d] = float(byte & 15) - 7.5f;
            row[d + width] = float(byte >> 4) - 7.5f;
        } else {
            row[d] = float(int8_t(side.is_k ? byte ^ 128 : byte));
        }
    }
}

void read(const Side& side, int head, int heads, const int64_t* blocks, int64_t count, Float type, void* out,
          const Pool& pool) {
    const int64_t items = heads * count;
    parallel(pool, items, items * BLOCK * side.dim >= 1 << 15, [&](int64_t item) {
        alignas(64) float row[LARGEST + W] = {};
        const int64_t cell = blocks[item % count] * side.heads + head + item / count;
        for (int t = 0; t < BLOCK; t++) {
            unpack(side, side.codes + cell * side.head_bytes, t, row);
            if (side.scales) {
                const float scale = side.token_scale[side.scales[cell * BLOCK + t]];
                for (int d = 0; d < side.dim; d++) row[d] *= scale;
            }
            if (side.rotated) rotate(row, side.dim);
            with_float(type, [&](auto kind) {
                auto* to = static_cast<decltype(kind)*>(out) + (item * BLOCK + t) * side.dim;
                for (int d = 0; d < side.dim; d++) from_float(row[d], to[d]);
            });
        }
    });
}

int64_t stream(const Side& side, const int64_t* blocks, int64_t count, const Pool& pool) {
    std::atomic<int64_t> total{0};
    parallel(pool, count, true, [&](int64_t b) {
        const uint8_t* block = side.codes + blocks[b] * side.heads * side.head_bytes;
        i32v sum[4] = {};
        for (int64_t at = 0; at + 16 * W <= side.heads * side.head_bytes; at += 16 * W)
            for (int i = 0; i < 4; i++) sum[i] += load<i32v>(block + at + i * 4 * W);
        total.fetch_add((sum[0] + sum[1] + sum[2] + sum[3])[0], std::memory_order_relaxed);
    });
    return total;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {ISA_NAME, write, decode, read, stream};

}  // namespace octavo::ISA
