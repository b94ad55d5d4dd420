// What a transformer computes between its products, each in one pass over memory. Compiled once for each instruction set.
//
// A row's bits depend on the row alone: its squares are summed in one order, and all else is element by element. torch
// computes the last numbers of each thread's share by another formula than those that fill a register, so there they
// depend on the shape and on the number of threads.
#include "elementwise.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "vectors.h"

namespace octavo::weights::ISA {
namespace {

using namespace octavo::ISA;

constexpr int64_t SMALL = 1 << 14;  // elements: fewer are not worth waking a thread for
constexpr int64_t PIECE = 1 << 12;  // elements that a thread takes at a time, at least

// body(from, to) for pieces of `items` items of so many elements each.
template <class F>
void in_pieces(int64_t items, int64_t elements, const Pool& pool, F&& body) {
    const int64_t piece = std::max<int64_t>(1, PIECE / std::max<int64_t>(1, elements));
    parallel(pool, (items + piece - 1) / piece, items * elements > SMALL,
             [&](int64_t i) { body(i * piece, std::min(items, (i + 1) * piece)); });
}

enum class Gate { NONE, FIRST, LAST };

// norm(x) ∘ weight of each `group` of a row's numbers, with silu(gate) before or after it.
template <Gate GATE>
void normalize(const float* x, int64_t stride, const float* gate, int64_t gate_stride, int64_t rows, int64_t dim,
               int64_t group, const float* weight, float epsilon, float* y, const Pool& pool) {
    in_pieces(rows, dim, pool, [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; r++)
            for (int64_t first = 0; first < dim; first += group) {
                const float *in = x + r * stride + first, *w = weight + first;
                const float* z = GATE == Gate::NONE ? nullptr : gate + r * gate_stride + first;
                float* out = y + r * dim + first;
                f32v squares[4] = {};
                each_vector(group, [&](int64_t i, int n) {
                    f32v v = load_some(in + i, n);
                    if constexpr (GATE == Gate::FIRST) {
                        v = v * silu(load_some(z + i, n));
                        store_some(out + i, v, n);
                    }
                    f32v& some = squares[i / W % 4];
                    some = fma(v, v, some);
                });
                const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(group);
                const f32v factor = splat(1 / std::sqrt(mean + epsilon));
                const float* own = GATE == Gate::FIRST ? out : in;
                each_vector(group, [&](int64_t i, int n) {
                    const f32v v = load_some(own + i, n) * factor * load_some(w + i, n);
                    store_some(out + i, GATE == Gate::LAST ? v * silu(load_some(z + i, n)) : v, n);
                });
            }
    });
}

void rms_norm(const float* x, int64_t rows, int64_t stride, int64_t dim, const float* weight, float epsilon, float* y,
              const Pool& pool) {
    normalize<Gate::NONE>(x, stride, nullptr, 0, rows, dim, dim, weight, epsilon, y, pool);
}

void gated_norm(const float* x, int64_t stride, const float* gate, int64_t gate_stride, int64_t rows, int64_t dim,
                int64_t group, const float* weight, float epsilon, bool gate_first, float* y, const Pool& pool) {
    const auto normalized = gate_first ? normalize<Gate::FIRST> : normalize<Gate::LAST>;
    normalized(x, stride, gate, gate_stride, rows, dim, group, weight, epsilon, y, pool);
}

// x·½(1 + tanh u) = x·σ(2u) with u = √(2/π)·(x + 0.044715x³).
f32v gelu_tanh(f32v x) { return x * sigmoid(1.5957691f * x * (1.0f + 0.044715f * x * x)); }
// x·½(1 + erf(x/√2)); Abramowitz and Stegun 7.1.26, off by 1.5e-7 at most.
f32v gelu(f32v x) {
    const f32v z = abs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    f32v p = splat(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = fma(p, t, splat(c));
    const f32v beyond = p * t * exp2(z * z * -LOG2E);  // 1 − erf z
    return 0.5f * x * (x < 0.0f ? beyond : 2.0f - beyond);
}

// f(i, n) as each_vector, on all threads.
template <class F>
void over_vectors(int64_t count, const Pool& pool, F&& f) {
    in_pieces((count + W - 1) / W, W, pool, [&](int64_t from, int64_t to) {
        each_vector(std::min(count, to * W) - from * W, [&](int64_t i, int n) { f(from * W + i, n); });
    });
}

void activate(Function function, const void* x, int64_t count, Float type, void* y, const Pool& pool) {
    with_float(type, [&](auto kind) {
        const auto* in = static_cast<const decltype(kind)*>(x);
        auto* out = static_cast<decltype(kind)*>(y);
        const auto each = [&](auto f) {
            over_vectors(count, pool, [&](int64_t i, int n) { store_some(out + i, f(load_some(in + i, n)), n); });
        };
        if (function == Function::SILU) each(silu);
        else if (function == Function::GELU) each(gelu);
        else each(gelu_tanh);
    });
}

void silu_gate(float* gate, const float* up, int64_t count, const Pool& pool) {
    over_vectors(count, pool, [&](int64_t i, int n) {
        store_some(gate + i, silu(load_some(gate + i, n)) * load_some(up + i, n), n);
    });
}

void rope(const Heads& x, int64_t rows, int64_t dim, const float* cos, int64_t cos_stride, const float* sin,
            int64_t sin_stride, float* y, const Pool& pool) {
    const int64_t half = dim / 2;
    in_pieces(rows, x.count * dim, pool, [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; r++)
            for (int64_t h = 0; h < x.count; h++) {
                const float *in = x.first + r * x.row_stride + h * x.stride, *c = cos + r * cos_stride;
                const float* s = sin + r * sin_stride;
                float* out = y + (r * x.count + h) * dim;
                each_vector(half, [&](int64_t i, int n) {  // products are rounded, as torch's are
                    const f32v a = load_some(in + i, n), b = load_some(in + half + i, n);
                    store_some(out + i, a * load_some(c + i, n) - b * load_some(s + i, n), n);
                    store_some(out + half + i, b * load_some(c + half + i, n) + a * load_some(s + half + i, n), n);
                });
            }
    });
}

}  // namespace

extern const ElementwiseKernels elementwise;
const ElementwiseKernels elementwise = {activate, rms_norm, gated_norm, silu_gate, rope};

}  // namespace octavo::weights::ISA
