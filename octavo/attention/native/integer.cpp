// Attention of single new tokens by products of bytes: the fastest where the processor has them, and bf16 for the chunks
// beside them. Of one query row and one block of 64 tokens:
//
//     scores    the query as two int8 (15 bits, relative to its own largest value) times the codes, in int32
//     softmax   relative to the block's own maximum, so that a strong first token does not push the tail into zeros
//     sum       the weights p·s as two uint8 (16 bits, relative to their own largest) times the codes, in int32
//
// and the blocks are joined in float by exp(m_block − m). Raw sides are products in float (product.h).
#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

#include "parallel.h"
#include "softmax.h"

namespace octavo::ISA {
namespace {

constexpr int64_t INLINE_BLOCKS = 32;  // of one query row: fewer are not worth waking a thread for
constexpr int64_t UNIT_BLOCKS = 8;  // fewest blocks of a piece of a split context
constexpr int UNITS_A_THREAD = 6;  // pieces for each thread to balance with
constexpr float ONES[] = {1, 1, 1, 1, 1, 1, 1, 1};
constexpr int KEPT = sizeof(ONES) / sizeof(float);

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

void prepare(Row& row, const Side& k, const Attention& attention, int head) {
    float* q = row.real;
    const int dim = k.dim;
    // q·mu is the same for every key: plain softmax drops it, a soft cap and a sink do not.
    row.shift = fold(q, k, attention.scale, head, attention.softcap || attention.sinks);
    if (!is_integer(k.code)) return;
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

// Calls f(first, R) for all rows, R at a time: MOST, and for the rest half as many, and so on.
template <int MOST, class F>
void by_rows(int from, int rows, F&& f) {
    for (; from + MOST <= rows; from += MOST) f(from, std::integral_constant<int, MOST>{});
    if constexpr (MOST > 1) by_rows<MOST / 2>(from, rows, f);
}

// Calls work(has four bits, R, first, ahead) for all rows of one block, as many at a time as there are registers for.
template <class F>
void over_block(const Side& side, const uint8_t* next, int rows, F&& work) {
    auto grouped = [&](auto four) {
        const int passes = rows / ROWS + std::popcount(unsigned(rows % ROWS));
        Ahead ahead({next, side.head_bytes}, passes * side.head_bytes);
        by_rows<ROWS>(0, rows, [&](int first, auto together) { work(four, together, first, ahead); });
    };
    if (side.code == Code::INT4) grouped(std::true_type{});
    else grouped(std::false_type{});
}

constexpr int64_t APART = sizeof(Row) / sizeof(float);  // of two rows' numbers

void scores_of(const Side& k, const uint8_t* block, const uint8_t* next, Row* rows, int count) {
    if (!is_integer(k.code))
        return multiply(k, {rows->real, APART}, count, block, {next, k.head_bytes}, {0, BLOCK}, {rows->weight, APART}, nullptr);
    over_block(k, next, count, [&](auto four, auto together, int first, Ahead& ahead) {
        dot_codes<decltype(four)::value, decltype(together)::value>(block, ahead, rows + first, k.dim);
    });
}

// Raw values only of tokens that are seen: the rest of a block is its last owner's, and a weight of 0 does not undo a NaN.
void add_values(const Side& v, const uint8_t* block, const uint8_t* next, Row* rows, int count, Range seen) {
    if (!is_integer(v.code)) {
        for (int r = 0; r < count; r += KEPT)
            multiply(v, {rows[r].weight, APART}, std::min(KEPT, count - r), block,
                     {next, v.head_bytes}, seen,
                     {rows[r].so_far.out, APART}, ONES);
        return;
    }
    over_block(v, next, count, [&](auto four, auto together, int first, Ahead& ahead) {
        add_codes<decltype(four)::value, decltype(together)::value>(block, ahead, rows + first, v.dim);
    });
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
                              Range seen, const Side& v) {
    Scores scores(row.weight, k_scale, row.shift, attention.softcap, seen);
    constexpr int N = Scores::N;
    f32v (&s)[N] = scores.of;
    const float top = scores.largest();
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
        row.factor *= exp2(top - so_far.top);
    } else {  // a new maximum: what was summed so far is relative to the old one
        const float keep = exp2(so_far.top - top);
        so_far.top = top;
        so_far.total *= keep;
        for (int d = 0; d < v.dim; d += W) store(so_far.out + d, load<f32v>(so_far.out + d) * keep);
    }
    so_far.total += sum(total) * row.factor;

    if (!is_integer(v.code)) {
        for (int i = 0; i < N; i++) store(row.weight + i * W, s[i] * row.factor);
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
        widen(q, step.q_start[unit.sequence], unit.head * group + r, k.dim, row.real);
        prepare(row, k, attention, unit.head);
        row.so_far.top = NOTHING;
        row.so_far.total = 0;
        std::fill_n(row.so_far.out, padded(v.dim), 0.0f);
    }
    for (int64_t b = unit.first; b < unit.last; b++) {
        const int64_t cell = table[b] * k.heads + unit.head;
        const int64_t next = (b + 1 < unit.last ? table[b + 1] : table[b]) * k.heads + unit.head;
        alignas(64) float k_scale[BLOCK], v_scale[BLOCK];
        const float *k_scales = scales_of(k, cell, k, next, k_scale), *v_scales = scales_of(v, cell, v, next, v_scale);
        const Range seen = {int(std::max<int64_t>(begin - b * BLOCK, 0)), int(std::min<int64_t>(end - b * BLOCK, BLOCK))};
        scores_of(k, k.codes + cell * k.head_bytes, k.codes + next * k.head_bytes, rows.data(), group);
        for (int r = 0; r < group; r++) soften(rows[r], attention, k_scales, v_scales, seen, v);
        add_values(v, v.codes + cell * v.head_bytes, v.codes + next * v.head_bytes, rows.data(), group, seen);
    }
}

}  // namespace

void decode(const Side& k, const Side& v, const Attention& natural, const Step& step, const Rows& q, void* out,
            const Pool& pool) {
    const Attention attention = in_bits(natural);
    const int group = attention.heads / k.heads;
    std::vector<int> single;  // sequences with one new token
    for (int s = 0; s < step.sequences; s++)
        if (step.q_start[s + 1] - step.q_start[s] == 1) single.push_back(s);
    auto first_block = [&](int s) { return first_seen(attention, step.kv_len[s]) / BLOCK; };
    auto end_block = [&](int s) { return (step.kv_len[s] + BLOCK - 1) / BLOCK; };
    int64_t blocks = 0;
    for (int s : single) blocks += (end_block(s) - first_block(s)) * k.heads;
    const bool worth_it = blocks * group > INLINE_BLOCKS;
    const int64_t most =
        worth_it ? std::max(UNIT_BLOCKS, blocks / (int64_t(pool.threads) * UNITS_A_THREAD)) : blocks + 1;

    std::vector<Unit> units;
    units.reserve(single.size() * k.heads);
    int64_t split_rows = 0;
    for (int s : single)
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
        auto view = [](Sum& sum) { return Sums{&sum.top, &sum.total, {sum.out, 0}}; };
        for (int64_t i = 1; i < unit.pieces; i++) join(view(pieces[0]), view(pieces[i * group]), v.dim);
        const int query_head = unit.head * group + r;
        finish(view(pieces[0]), nullptr, v, attention, unit.head, step.q_start[unit.sequence], query_head, q.type, out);
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

}  // namespace octavo::ISA
