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
#include <limits>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace octavo::ISA {
namespace {

constexpr float NOTHING = -1e30f;  // maximum of a row that has seen nothing: finite, so that differences are not NaN
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t INLINE_BYTES = 1 << 17;  // of codes: less is not worth waking a thread for
constexpr int64_t UNIT_BLOCKS = 8;  // fewest blocks of a piece of a split context
constexpr int UNITS_A_THREAD = 6;  // pieces for each thread to balance with

inline int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

template <class F>
void with_float(Float type, F&& f) {
    if (type == Float::BF16) f(bf16{});
    else if (type == Float::FP16) f(fp16{});
    else f(float{});
}

// Orthonormal Hadamard transform of the largest power of two that divides dim, block by block; its own inverse.
void rotate(float* x, int dim) {
    const int size = dim & -dim;
    for (int base = 0; base < dim; base += size)
        for (int half = 1; half < size; half *= 2)
            for (int i = base; i < base + size; i += 2 * half)
                for (int j = i; j < i + half; j++) {
                    const float a = x[j], b = x[j + half];
                    x[j] = a + b;
                    x[j + half] = a - b;
                }
    const float scale = float(1.0 / std::sqrt(double(size)));  // as the specification rounds it
    for (int d = 0; d < dim; d++) x[d] *= scale;
}

// ---------------------------------------------------------------------------------------------------------- writing

// In this order of arguments a NaN becomes −128: converting one would be undefined.
inline uint8_t signed_code(float x) { return uint8_t(int8_t(std::min(std::max(-128.0f, x), 127.0f))); }

// Codes of one row: y[dim] in, codes out; returns how many values were out of range.
int encode(const Side& side, float* y, uint8_t* code, uint8_t* scale_index) {
    const int dim = side.dim;
    if (side.rotated) rotate(y, dim);
    int saturated = 0;
    if (!side.scales) {
        for (int d = 0; d < dim; d++) {
            saturated += std::fabs(y[d]) > 128.5f;
            code[d] = signed_code(std::nearbyint(y[d]));
        }
        return saturated;
    }
    float absmax = 0;
    for (int d = 0; d < dim; d++) absmax = std::max(absmax, std::fabs(y[d]));
    const float* limit = std::lower_bound(side.token_limit, side.token_limit + 255, absmax);
    *scale_index = uint8_t(limit - side.token_limit);
    const float reciprocal = side.token_reciprocal[*scale_index];
    if (side.code == Code::INT8) {
        for (int d = 0; d < dim; d++) {
            const float scaled = y[d] * reciprocal;
            saturated += std::fabs(scaled) > 127.5f;
            code[d] = signed_code(std::nearbyint(scaled));
        }
    } else {
        for (int d = 0; d < dim; d++) {
            const float scaled = y[d] * reciprocal;
            saturated += std::fabs(scaled) > 8.5f;
            code[d] = uint8_t(std::min(std::max(0.0f, std::floor(scaled) + 8.0f), 15.0f));
        }
    }
    return saturated;
}

// Put the codes of one row into its place of a block.
void place(const Side& side, uint8_t* block, int token, const uint8_t* code) {
    const int dim = side.dim, half = dim / 2;
    const int width = side.code == Code::INT4 ? half : dim;
    for (int d = 0; d < width; d++) {
        uint8_t byte = code[d];
        if (side.code == Code::INT4) byte |= code[d + half] << 4;
        else if (side.is_k) byte ^= 128;
        const int64_t at = side.is_k ? (int64_t(d / 4) * BLOCK + token) * 4 + d % 4
                                     : (int64_t(token / 4) * width + d) * 4 + token % 4;
        block[at] = byte;
    }
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
            with_float(x.type, [&](auto type) {
                const auto* in = static_cast<const decltype(type)*>(x.data) + t * x.token_stride + head * x.head_stride;
                for (int d = 0; d < side.dim; d++) row[d] = to_float(in[d]);
            });
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

// One query row, ready to meet the codes of one head.
struct Query {
    std::vector<float> real;  // [dim] folded: scale·R(q ∘ c)
    std::vector<int8_t> high, low;  // [dim] real ≈ step·(128·high + low)
    float step = 0, shift = 0;  // shift: q·mu
    float sum = 0;  // Σ(128·high + low)
};

void prepare(Query& query, const Side& k, const Attention& attention, int head, bool integer) {
    float* q = query.real.data();
    const int dim = k.dim;
    float shift = 0;
    if (k.mu) {
        const float *mu = k.mu + int64_t(head) * dim, *c = k.c + int64_t(head) * dim;
        // q·mu is the same for every key: plain softmax drops it, a soft cap and a sink do not.
        if (attention.softcap || attention.sinks)
            for (int d = 0; d < dim; d++) shift += q[d] * mu[d];
        for (int d = 0; d < dim; d++) q[d] *= c[d];
    }
    query.shift = shift;
    if (k.rotated) rotate(q, dim);
    if (!integer) return;
    float largest = 0;
    for (int d = 0; d < dim; d++) largest = std::fabs(q[d]) > largest ? std::fabs(q[d]) : largest;
    constexpr float STEPS = 16256;  // 128·127
    query.step = largest > 0 ? largest / STEPS : 1.0f;
    const float inverse = std::min(1.0f / query.step, std::numeric_limits<float>::max());
    int sum = 0;
    int8_t *high = query.high.data(), *low = query.low.data();
    for (int d = 0; d < dim; d++) {
        // In this order of arguments a NaN becomes a bound.
        const int value = int(std::min(std::max(-STEPS, std::nearbyint(q[d] * inverse)), STEPS));
        const int upper = (value + 64) >> 7;
        high[d] = int8_t(upper);
        low[d] = int8_t(value - 128 * upper);
        sum += value;
    }
    query.sum = float(sum);
}

// The next block is asked for while this one is computed on, by the first pass over it: `next` is null in the others.
inline void prefetch(const uint8_t* next, int64_t offset) {
    if (next) __builtin_prefetch(next + offset, 0, 2);
}

// scores[r][64] += integer dot products of R queries with a block of K codes.
template <bool FOUR, int R>
void dot_codes(const uint8_t* block, const uint8_t* next, const Query* const* queries, int dim, float* const* scores) {
    const int groups = dim / 4 / (FOUR ? 2 : 1), half = dim / 2;
    for (int t = 0; t < BLOCK; t += PASS * W) {
        i32v high[R][PASS] = {}, low[R][PASS] = {};
        for (int g = 0; g < groups; g++) {
            const uint8_t* at = block + (int64_t(g) * BLOCK + t) * 4;
            for (int i = 0; i < PASS; i++) {
                prefetch(next, at - block + i * 4 * W);
                const u8v codes = load<u8v>(at + i * 4 * W);
                if constexpr (FOUR) {
                    const u8v first = codes & (uint8_t)15, second = (u8v)((u32v)codes >> 4) & (uint8_t)15;
                    for (int r = 0; r < R; r++) {
                        const Query& q = *queries[r];
                        high[r][i] = dot4(high[r][i], first, splat4(&q.high[4 * g]));
                        low[r][i] = dot4(low[r][i], first, splat4(&q.low[4 * g]));
                        high[r][i] = dot4(high[r][i], second, splat4(&q.high[half + 4 * g]));
                        low[r][i] = dot4(low[r][i], second, splat4(&q.low[half + 4 * g]));
                    }
                } else {
                    for (int r = 0; r < R; r++) {
                        high[r][i] = dot4(high[r][i], codes, splat4(&queries[r]->high[4 * g]));
                        low[r][i] = dot4(low[r][i], codes, splat4(&queries[r]->low[4 * g]));
                    }
                }
            }
        }
        for (int r = 0; r < R; r++) {
            const float center = queries[r]->sum * (FOUR ? 7.5f : 128.0f);
            for (int i = 0; i < PASS; i++)
                store(scores[r] + t + i * W,
                      (to_float(high[r][i] * 128 + low[r][i]) - center) * queries[r]->step);
        }
    }
}

template <class T, int R>
void dot_raw(const uint8_t* block, const uint8_t* next, const Query* const* queries, int dim, float* const* scores) {
    const T* keys = reinterpret_cast<const T*>(block);
    for (int t = 0; t < BLOCK; t += PASS * W) {
        f32v sum[R][PASS] = {};
        for (int d = 0; d < dim; d++) {
            const T* at = keys + int64_t(d) * BLOCK + t;
            for (int i = 0; i < PASS; i++) {
                if (i * W * sizeof(T) % 64 == 0) prefetch(next, reinterpret_cast<const uint8_t*>(at + i * W) - block);
                const f32v k = load_float(at + i * W);
                for (int r = 0; r < R; r++) sum[r][i] += k * queries[r]->real[d];
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < PASS; i++) store(scores[r] + t + i * W, sum[r][i]);
    }
}

// out[at … at + W) += x, of which lanes from `end` on are the next row's: they were read into the register and are dropped.
inline void add_to(float* out, int at, int end, f32v x) {
    if (at + W <= end) return store(out + at, load<f32v>(out + at) + x);
    for (int lane = 0; lane < end - at; lane++) out[at + lane] += x[lane];
}

// Weights of a block as two bytes each: w ≈ step·(256·high + low).
struct Weights {
    alignas(64) float real[BLOCK];
    alignas(64) uint8_t high[BLOCK], low[BLOCK];
    float step, sum;  // sum: Σ(256·high + low)
};

// A row's share of a block: out[v.dim] += factor·Σ_t w_t code_t.
struct Sum {
    const Weights* weights;
    float factor;
    float* out;
};

// R rows over a block of V codes, N registers of channels from d on.
template <bool FOUR, int R, int N>
void add_codes_pass(const uint8_t* block, const uint8_t* next, const Sum* sums, int width, int d) {
    constexpr int PARTS = FOUR ? 2 : 1;  // channels d and d + width share a byte
    i32v high[R][N][PARTS] = {}, low[R][N][PARTS] = {};
    for (int t = 0; t < BLOCK / 4; t++) {
        const uint8_t* at = block + (int64_t(t) * width + d) * 4;
        for (int i = 0; i < N; i++) {
            prefetch(next, at - block + i * 4 * W);
            const u8v codes = load<u8v>(at + i * 4 * W);
            const u8v parts[2] = {FOUR ? codes & (uint8_t)15 : codes, (u8v)((u32v)codes >> 4) & (uint8_t)15};
            for (int r = 0; r < R; r++)
                for (int part = 0; part < PARTS; part++) {
                    high[r][i][part] = dot4(high[r][i][part], splat4(sums[r].weights->high + 4 * t), parts[part]);
                    low[r][i][part] = dot4(low[r][i][part], splat4(sums[r].weights->low + 4 * t), parts[part]);
                }
        }
    }
    for (int r = 0; r < R; r++) {
        const float factor = sums[r].factor * sums[r].weights->step;
        const float center = FOUR ? -7.5f * sums[r].weights->sum * factor : 0.0f;
        for (int i = 0; i < N; i++)
            for (int part = 0; part < PARTS; part++) {
                const f32v add = to_float(high[r][i][part] * 256 + low[r][i][part]) * factor + center;
                add_to(sums[r].out + part * width, d + i * W, width, add);
            }
    }
}

template <bool FOUR, int R>
void add_codes(const uint8_t* block, const uint8_t* next, const Sum* sums, int dim) {
    constexpr int MOST = FOUR ? PASS / 2 : PASS;
    const int width = FOUR ? dim / 2 : dim;
    int d = 0;
    for (; d + (MOST - 1) * W < width; d += MOST * W) add_codes_pass<FOUR, R, MOST>(block, next, sums, width, d);
    for (; d < width; d += W) add_codes_pass<FOUR, R, 1>(block, next, sums, width, d);
}

template <class T, int R, int N>
void add_raw_pass(const uint8_t* block, const uint8_t* next, const Sum* sums, int dim, int d) {
    const T* values = reinterpret_cast<const T*>(block);
    f32v sum[R][N] = {};
    for (int t = 0; t < BLOCK; t++) {
        const T* at = values + int64_t(t) * dim + d;
        for (int i = 0; i < N; i++) {
            if (i * W * sizeof(T) % 64 == 0) prefetch(next, reinterpret_cast<const uint8_t*>(at + i * W) - block);
            const f32v v = load_float(at + i * W);
            for (int r = 0; r < R; r++) sum[r][i] += v * sums[r].weights->real[t];
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) add_to(sums[r].out, d + i * W, dim, sum[r][i] * sums[r].factor);
}

template <class T, int R>
void add_raw(const uint8_t* block, const uint8_t* next, const Sum* sums, int dim) {
    int d = 0;
    for (; d + (PASS - 1) * W < dim; d += PASS * W) add_raw_pass<T, R, PASS>(block, next, sums, dim, d);
    for (; d < dim; d += W) add_raw_pass<T, R, 1>(block, next, sums, dim, d);
}

// A query row's running softmax over the blocks it has seen.
struct Partial {
    float top, total;
    float* out;  // [v.dim], padded
};

template <int R>
void scores_of(const Side& k, const uint8_t* block, const uint8_t* next, const Query* const* queries, float* const* scores) {
    switch (k.code) {
        case Code::BF16: return dot_raw<bf16, R>(block, next, queries, k.dim, scores);
        case Code::FP16: return dot_raw<fp16, R>(block, next, queries, k.dim, scores);
        case Code::FP32: return dot_raw<float, R>(block, next, queries, k.dim, scores);
        case Code::INT8: return dot_codes<false, R>(block, next, queries, k.dim, scores);
        case Code::INT4: return dot_codes<true, R>(block, next, queries, k.dim, scores);
    }
}

template <int R>
void add_values(const Side& v, const uint8_t* block, const uint8_t* next, const Sum* sums) {
    switch (v.code) {
        case Code::BF16: return add_raw<bf16, R>(block, next, sums, v.dim);
        case Code::FP16: return add_raw<fp16, R>(block, next, sums, v.dim);
        case Code::FP32: return add_raw<float, R>(block, next, sums, v.dim);
        case Code::INT8: return add_codes<false, R>(block, next, sums, v.dim);
        case Code::INT4: return add_codes<true, R>(block, next, sums, v.dim);
    }
}

// Calls f(from, std::integral_constant<int, R>, first) for all rows, R at a time.
template <class F>
void by_rows(int64_t rows, F&& f) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) f(r, std::integral_constant<int, ROWS>{});
    for (; r < rows; r++) f(r, std::integral_constant<int, 1>{});
}

inline bool is_integer(const Side& side) { return side.code == Code::INT8 || side.code == Code::INT4; }

// cap·tanh(s/cap), by tanh|x| = (1 − e^−2|x|)/(1 + e^−2|x|).
inline f32v softcap(f32v s, float cap) {
    const f32v size = s < 0.0f ? -s : s, e = exp(size * (-2.0f / cap));
    const f32v capped = (1.0f - e) / (1.0f + e) * cap;
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

// Scores of one row become weights; returns false if the row sees nothing of the block, of which it sees [from, to).
bool soften(const float* scores, const Query& query, const Attention& attention, const float* k_scale,
            const float* v_scale, int64_t from, int64_t to, const Side& v, Weights& w, float& top, float& total) {
    constexpr int N = BLOCK / W;  // the whole block stays in registers
    f32v s[N];
    for (int i = 0; i < N; i++) {
        s[i] = load<f32v>(scores + i * W);
        if (k_scale) s[i] = s[i] * load<f32v>(k_scale + i * W);
        s[i] = s[i] + query.shift;
    }
    if (attention.softcap)
        for (int i = 0; i < N; i++) s[i] = softcap(s[i], attention.softcap);
    if (from > 0 || to < BLOCK) {
        const int32_t first = int32_t(std::max<int64_t>(from, 0)), end = int32_t(std::clamp<int64_t>(to, 0, BLOCK));
        for (int i = 0; i < N; i++) {
            const i32v token = counting() + i * W;
            s[i] = (token >= first) & (token < end) ? s[i] : splat(-INFINITE);
        }
    }
    f32v most = s[0];
    for (int i = 1; i < N; i++) most = max(most, s[i]);
    top = max(most);
    if (!(top > -INFINITE)) return false;
    f32v sum_of = {}, largest = {};
    for (int i = 0; i < N; i++) {
        s[i] = exp(s[i] - top);
        sum_of = sum_of + s[i];
        if (v_scale) s[i] = s[i] * load<f32v>(v_scale + i * W);
        largest = max(largest, s[i]);
    }
    total = sum(sum_of);
    if (!is_integer(v)) {
        for (int i = 0; i < N; i++) store(w.real + i * W, s[i]);
        return true;
    }
    const float peak = v_scale ? max(largest) : 1.0f;  // the best token's own weight is 1
    constexpr float STEPS = 65534;  // 16 bits, and room for what is added
    const float inverse = peak > 0 ? STEPS / peak : 0.0f;
    w.step = peak / STEPS;
    f32v sum_w = {};
    for (int i = 0; i < N; i++) {
        const i32v value = __builtin_convertvector(s[i] * inverse + load<f32v>(DITHER.of + i * W), i32v);
        sum_w = sum_w + to_float(value);
        store_bytes(w.high + i * W, value >> 8);
        store_bytes(w.low + i * W, value);
    }
    w.sum = v.code == Code::INT4 ? sum(sum_w) : 0.0f;
    return true;
}

// Some blocks of one sequence and one KV head, for all query rows that share them.
struct Unit {
    int sequence, head;
    int64_t first, last;  // blocks
    int64_t partial;  // where its rows' results stand
    bool whole;  // the only unit of its sequence and head
};

struct Scratch {
    std::vector<Query> queries;
    std::vector<float> scores, scales;
    std::vector<Weights> weights;
    std::vector<Sum> sums;
};

void attend_unit(const Unit& unit, const Side& k, const Side& v, const Attention& attention, const Step& step,
                 const Rows& q, Partial* partials, Scratch& scratch) {
    const int group = attention.heads / k.heads;
    const int64_t added = step.new_tokens[unit.sequence], rows = added * group;
    const int64_t kv_len = step.kv_len[unit.sequence];
    const int64_t* table = step.table + unit.sequence * step.table_width;

    scratch.queries.resize(std::max<size_t>(scratch.queries.size(), rows));
    scratch.scores.resize(rows * BLOCK);
    scratch.scales.resize(2 * BLOCK);
    scratch.weights.resize(rows);
    scratch.sums.resize(rows);
    for (int64_t r = 0; r < rows; r++) {
        Query& query = scratch.queries[r];
        query.real.resize(k.dim);
        query.high.resize(k.dim);
        query.low.resize(k.dim);
        with_float(q.type, [&](auto type) {
            const auto* in = static_cast<const decltype(type)*>(q.data) +
                             (step.first_row[unit.sequence] + r / group) * q.token_stride +
                             (unit.head * group + r % group) * q.head_stride;
            for (int d = 0; d < k.dim; d++) query.real[d] = to_float(in[d]) * attention.scale;
        });
        prepare(query, k, attention, unit.head, is_integer(k));
        Partial& partial = partials[unit.partial + r];
        partial.top = NOTHING;
        partial.total = 0;
        std::fill_n(partial.out, padded(v.dim), 0.0f);
    }

    for (int64_t b = unit.first; b < unit.last; b++) {
        const int64_t cell = table[b] * k.heads + unit.head;
        const int64_t ahead = (b + 1 < unit.last ? table[b + 1] : table[b]) * k.heads + unit.head;
        const uint8_t *k_block = k.codes + cell * k.head_bytes, *k_next = k.codes + ahead * k.head_bytes;
        const uint8_t *v_block = v.codes + cell * v.head_bytes, *v_next = v.codes + ahead * v.head_bytes;
        float *k_scale = nullptr, *v_scale = nullptr;
        if (k.scales) {
            k_scale = scratch.scales.data();
            for (int t = 0; t < BLOCK; t++) k_scale[t] = k.token_scale[k.scales[cell * BLOCK + t]];
        }
        if (v.scales) {
            v_scale = scratch.scales.data() + BLOCK;
            for (int t = 0; t < BLOCK; t++) v_scale[t] = v.token_scale[v.scales[cell * BLOCK + t]];
        }
        by_rows(rows, [&](int64_t r, auto together) {
            constexpr int R = decltype(together)::value;
            const Query* queries[R];
            float* scores[R];
            for (int i = 0; i < R; i++) {
                queries[i] = &scratch.queries[r + i];
                scores[i] = scratch.scores.data() + (r + i) * BLOCK;
            }
            scores_of<R>(k, k_block, r ? nullptr : k_next, queries, scores);
        });
        int64_t seeing = 0;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t position = kv_len - added + r / group;
            const int64_t oldest = attention.window ? std::max<int64_t>(0, position - attention.window + 1) : 0;
            Weights& weights = scratch.weights[seeing];
            float top, total;
            if (!soften(scratch.scores.data() + r * BLOCK, scratch.queries[r], attention, k_scale, v_scale,
                        oldest - b * BLOCK, position + 1 - b * BLOCK, v, weights, top, total))
                continue;
            Partial& partial = partials[unit.partial + r];
            float take = 1;
            if (top <= partial.top) {
                take = std::exp(top - partial.top);
            } else {  // a new maximum: what was summed so far is relative to the old one
                const float keep = std::exp(partial.top - top);
                partial.top = top;
                partial.total *= keep;
                for (int64_t d = 0; d < padded(v.dim); d += W)
                    store(partial.out + d, load<f32v>(partial.out + d) * keep);
            }
            partial.total += total * take;
            scratch.sums[seeing++] = {&weights, take, partial.out};
        }
        by_rows(seeing, [&](int64_t r, auto together) {
            add_values<decltype(together)::value>(v, v_block, r ? nullptr : v_next, &scratch.sums[r]);
        });
    }
}

// Join the pieces of a row, divide, undo the rotation and the static part of V, and store.
template <class T>
void finish(Partial* pieces, int64_t count, int64_t stride, const Side& v, const Attention& attention, int query_head,
            int head, T* out) {
    float top = NOTHING, total = 0;
    for (int64_t i = 0; i < count; i++) top = std::max(top, pieces[i * stride].top);
    float* sum_of = pieces[0].out;
    for (int64_t i = 0; i < count; i++) {
        const Partial& piece = pieces[i * stride];
        const float factor = std::exp(piece.top - top);
        total += piece.total * factor;
        for (int d = 0; d < v.dim; d++) sum_of[d] = (i ? sum_of[d] : 0.0f) + piece.out[d] * factor;
    }
    float denominator = total;
    if (attention.sinks) denominator += std::exp(attention.sinks[query_head] - top);
    denominator = std::max(denominator, std::numeric_limits<float>::min());  // a row that saw nothing is 0, not 0/0
    const float weight = total / denominator;
    for (int d = 0; d < v.dim; d++) sum_of[d] /= denominator;
    if (v.rotated) rotate(sum_of, v.dim);
    for (int d = 0; d < v.dim; d++) {
        float x = sum_of[d];
        if (v.mu) x = x * v.c[head * v.dim + d] + weight * v.mu[head * v.dim + d];
        from_float(x, out[d]);
    }
}

void decode(const Side& k, const Side& v, const Attention& attention, const Step& step, const Rows& q, void* out,
            const Pool& pool) {
    const int group = attention.heads / k.heads;
    auto first_block = [&](int s) {
        if (!attention.window) return int64_t(0);
        return std::max<int64_t>(0, step.kv_len[s] - step.new_tokens[s] - attention.window + 1) / BLOCK;
    };
    auto end_block = [&](int s) { return (step.kv_len[s] + BLOCK - 1) / BLOCK; };
    int64_t blocks = 0;
    for (int s = 0; s < step.sequences; s++) blocks += (end_block(s) - first_block(s)) * k.heads;
    const bool worth_it = blocks * (k.head_bytes + v.head_bytes) > INLINE_BYTES;
    const int64_t piece =
        worth_it ? std::max(UNIT_BLOCKS, blocks / (int64_t(pool.threads) * UNITS_A_THREAD)) : blocks + 1;

    std::vector<Unit> units;
    struct Finish { int sequence, head; int64_t partial, pieces; };
    std::vector<Finish> ends;
    int64_t partial = 0;
    for (int s = 0; s < step.sequences; s++)
        for (int h = 0; h < k.heads; h++) {
            const int64_t begin = first_block(s), end = end_block(s), rows = step.new_tokens[s] * group;
            const int64_t pieces = std::max<int64_t>(1, (end - begin + piece - 1) / piece);
            ends.push_back({s, h, partial, pieces});
            for (int64_t i = 0; i < pieces; i++, partial += rows)
                units.push_back({s, h, begin + (end - begin) * i / pieces, begin + (end - begin) * (i + 1) / pieces,
                                 partial, pieces == 1});
        }
    std::vector<float> sums(partial * padded(v.dim));
    std::vector<Partial> partials(partial);
    for (int64_t i = 0; i < partial; i++) partials[i].out = sums.data() + i * padded(v.dim);

    auto finish_rows = [&](int s, int h, int64_t at, int64_t pieces) {
        const int64_t rows = step.new_tokens[s] * group;
        for (int64_t r = 0; r < rows; r++) {
            const int query_head = h * group + int(r % group);
            const int64_t row = step.first_row[s] + r / group;
            with_float(q.type, [&](auto type) {
                auto* to = static_cast<decltype(type)*>(out) + (row * attention.heads + query_head) * v.dim;
                finish(&partials[at + r], pieces, rows, v, attention, query_head, h, to);
            });
        }
    };
    parallel(pool, int64_t(units.size()), worth_it, [&](int64_t i) {
        thread_local Scratch scratch;
        attend_unit(units[i], k, v, attention, step, q, partials.data(), scratch);
        if (units[i].whole) finish_rows(units[i].sequence, units[i].head, units[i].partial, 1);
    });
    for (const Finish& end : ends)
        if (end.pieces > 1) finish_rows(end.sequence, end.head, end.partial, end.pieces);
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

void read(const Side& side, int head, const int64_t* blocks, int64_t count, Float type, void* out, const Pool& pool) {
    parallel(pool, count, count * BLOCK * side.dim >= 1 << 15, [&](int64_t b) {
        thread_local std::vector<float> row;
        row.resize(side.dim);
        const int64_t cell = blocks[b] * side.heads + head;
        const uint8_t* block = side.codes + cell * side.head_bytes;
        for (int t = 0; t < BLOCK; t++) {
            unpack(side, block, t, row.data());
            const float scale = side.scales ? side.token_scale[side.scales[cell * BLOCK + t]] : 1.0f;
            with_float(type, [&](auto kind) {
                auto* to = static_cast<decltype(kind)*>(out) + (b * BLOCK + t) * side.dim;
                for (int d = 0; d < side.dim; d++) from_float(row[d] * scale, to[d]);
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
