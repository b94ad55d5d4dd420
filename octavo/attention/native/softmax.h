// A softmax that runs over the pages of a context (Milakov & Gimelshein 2018). Scores are in bits: weights are powers of 2.
#pragma once

#include <limits>

#include "product.h"
#include "rows.h"

namespace octavo::ISA {

constexpr float NOTHING = -1e30f;  // maximum of a row that has seen nothing: finite, so that differences are not NaN
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline float exp2(float x) { return exp2(splat(x))[0]; }

// Scores in bits: weights are then powers of two.
inline Attention in_bits(Attention attention) {
    attention.scale *= LOG2E;
    attention.softcap *= LOG2E;
    return attention;
}

// cap·tanh(s/cap), by tanh|x| = (1 − e^−2|x|)/(1 + e^−2|x|).
inline f32v softcap(f32v s, float cap) {
    const f32v e = exp2(abs(s) * (-2.0f * LOG2E / cap)), capped = (1.0f - e) / (1.0f + e) * cap;
    return s < 0.0f ? -capped : capped;
}

// The scores of a page, one query row's, as they are compared: scaled by token, shifted, capped, −∞ where not seen.
struct Scores {
    static constexpr int N = BLOCK / W;  // all of them stay in registers
    f32v of[N];
    [[gnu::always_inline]] Scores(const float* products, const float* scale, float shift, float cap, Range seen) {
        for (int i = 0; i < N; i++) {
            of[i] = load<f32v>(products + i * W);
            if (scale) of[i] *= load<f32v>(scale + i * W);
        }
        if (shift != 0)
            for (int i = 0; i < N; i++) of[i] += shift;
        if (cap)
            for (int i = 0; i < N; i++) of[i] = softcap(of[i], cap);
        if (seen.from > 0 || seen.to < BLOCK)
            for (int i = 0; i < N; i++) {
                const i32v token = counting() + i * W;
                of[i] = (token >= seen.from) & (token < seen.to) ? of[i] : splat(-INFINITE);
            }
    }
    float largest() const {
        f32v most = of[0];
        for (int i = 1; i < N; i++) most = max(of[i], most);
        return std::max(max(most), NOTHING);
    }
};

// The rows' sums over what they have seen: Σ 2^(score − top), and out = Σ 2^(score − top)·value.
struct Sums {
    float *top, *total;  // [rows]
    Matrix out;
    void clear(int rows, int width) {
        std::fill_n(top, rows, NOTHING);
        std::fill_n(total, rows, 0.0f);
        for (int r = 0; r < rows; r++) std::fill_n(out.from(r).at, width, 0.0f);
    }
    Sums from(int64_t row) const { return {top + row, total + row, out.from(row)}; }
};

// The token scales of a page's rows, in out [BLOCK]; null where the side has none. Those of what is read next are fetched.
inline const float* scales_of(const Side& side, int64_t cell, const Side& next, int64_t next_cell, float* out) {
    if (next.scales) __builtin_prefetch(next.scales + next_cell * BLOCK, 0, 3);
    if (!side.scales) return nullptr;
    for (int t = 0; t < BLOCK; t += W) store(out + t, look_up(side.token_scale, side.scales + cell * BLOCK + t));
    return out;
}

// One row's sums `more`, of later pages, go into `sums`.
inline void join(Sums sums, Sums more, int width) {
    if (*more.top == NOTHING) return;  // saw nothing
    const float top = std::max(*sums.top, *more.top), own = exp2(*sums.top - top), other = exp2(*more.top - top);
    *sums.total = *sums.total * own + *more.total * other;
    *sums.top = top;
    for (int d = 0; d < width; d += W)
        store(sums.out.at + d, load<f32v>(sums.out.at + d) * own + load<f32v>(more.out.at + d) * other);
}

// One row's answer: its sums, and those of raw rows where there are any, over their common denominator; the rotation and
// the static part of V undone; rounded once, into out [rows, heads, dim].
inline void finish(Sums sums, const Sums* raw, const Side& v, const Attention& attention, int head, int64_t row,
                   int query_head, Float type, void* out) {
    const float top = raw ? std::max(*sums.top, *raw->top) : *sums.top;
    const float own = exp2(*sums.top - top), other = raw ? exp2(*raw->top - top) : 0;
    float denominator = *sums.total * own + (raw ? *raw->total * other : 0), *x = sums.out.at;
    if (attention.sinks) denominator += exp2(std::min(attention.sinks[query_head] * LOG2E - top, 120.0f));
    // A row that saw nothing is 0, not 0/0.
    const float share = 1.0f / std::max(denominator, std::numeric_limits<float>::min());
    for (int d = 0; d < v.dim; d++) x[d] *= own * share;
    unfold(x, v, *sums.total * own * share, head);
    if (raw)
        for (int d = 0; d < v.dim; d++) x[d] += raw->out.at[d] * (other * share);
    with_float(type, [&](auto kind) {
        auto* to = static_cast<decltype(kind)*>(out) + (row * attention.heads + query_head) * v.dim;
        for (int d = 0; d < v.dim; d++) from_float(x[d], to[d]);
    });
}

}  // namespace octavo::ISA
