// What a transformer computes between its products, each in one pass over memory. Compiled once for each instruction set.
//
// A row's bits depend on the row alone: its squares are summed in one order, and all else is element by element.
#include "elementwise.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace octavo::weights::ISA {
namespace {

using namespace octavo::ISA;

constexpr int64_t SMALL = 1 << 14;  // elements: fewer are not worth waking a thread for
constexpr int64_t PIECE = 1 << 12;  // elements that a thread takes at a time, at least
constexpr float LOG2E = 1.44269504f;

// f(i, n) for vectors of n = W elements from i on, and a last one of fewer.
template <class F>
inline void each_vector(int64_t count, F&& f) {
    int64_t i = 0;
    for (; i + W <= count; i += W) f(i, W);
    if (i < count) f(i, int(count - i));
}
inline f32v load_some(const float* p, int n) {
    if (n == W) return load<f32v>(p);
    f32v v = {};
    std::memcpy(&v, p, sizeof(float) * n);
    return v;
}
inline void store_some(float* p, f32v v, int n) {
    if (n == W) return store(p, v);
    std::memcpy(p, &v, sizeof(float) * n);
}

// body(from, to) for pieces of `items` items of so many elements each.
template <class F>
void in_pieces(int64_t items, int64_t elements, const Pool& pool, F&& body) {
    const int64_t piece = std::max<int64_t>(1, PIECE / std::max<int64_t>(1, elements));
    parallel(pool, (items + piece - 1) / piece, items * elements > SMALL,
             [&](int64_t i) { body(i * piece, std::min(items, (i + 1) * piece)); });
}

void rms_norm(const float* x, int64_t rows, int64_t stride, int64_t dim, const float* weight, float epsilon, float* y,
              const Pool& pool) {
    in_pieces(rows, dim, pool, [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; r++) {
            const float* in = x + r * stride;
            float* out = y + r * dim;
            f32v squares[4] = {};
            each_vector(dim, [&](int64_t i, int n) {
                const f32v v = load_some(in + i, n);
                f32v& some = squares[i / W % 4];
                some = fma(v, v, some);
            });
            const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(dim);
            const f32v factor = splat(1 / std::sqrt(mean + epsilon));
            each_vector(dim, [&](int64_t i, int n) {
                store_some(out + i, load_some(in + i, n) * factor * load_some(weight + i, n), n);
            });
        }
    });
}

void silu_gate(float* gate, const float* up, int64_t count, const Pool& pool) {
    in_pieces((count + W - 1) / W, W, pool, [&](int64_t from, int64_t to) {
        each_vector(std::min(count, to * W) - from * W, [&](int64_t i, int n) {
            float* at = gate + from * W + i;
            const f32v x = load_some(at, n), e = exp2(abs(x) * -LOG2E);  // of what is not above 0
            const f32v sigmoid = (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
            store_some(at, x * sigmoid * load_some(up + from * W + i, n), n);
        });
    });
}

}  // namespace

extern const ElementwiseKernels elementwise;
const ElementwiseKernels elementwise = {rms_norm, silu_gate};

}  // namespace octavo::weights::ISA
