// State-space models, row after row for each sequence: the same sums in the same order, however a sequence was cut into
// steps.
#include "kernels.h"

namespace octavo::recurrences::ISA {
namespace {

constexpr int TOGETHER = 4;  // rows of a state that share a pass over B and C

}  // namespace

void scan(const Step& step, Rows x, Rows dt, Rows b, Rows c, const float* a, const float* d, const float* bias,
          bool with_softplus, float low, float high, int64_t heads, int64_t group, int64_t p_dim, int64_t n_dim,
          States states, float* y, const Pool& pool) {
    const int64_t wide = whole(n_dim);
    parallel(pool, step.sequences * heads, step.starts[step.sequences] * heads * p_dim * n_dim > SMALL, [&](int64_t item) {
        const int64_t s = item / heads, h = item % heads;
        float* state = states.first + step.slots[s] * states.stride + h * p_dim * n_dim;
        thread_local std::vector<float> scratch;
        scratch.assign((2 * TILE + TOGETHER) * wide, 0);
        float *bs = scratch.data(), *cs = bs + TILE * wide, *own = cs + TILE * wide;
        float delta[TILE], decay[TILE];
        for (int64_t from = step.starts[s]; from < step.starts[s + 1]; from += TILE) {
            const int64_t rows = std::min(TILE, step.starts[s + 1] - from);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t t = from + r;
                float now = dt.first[t * dt.row + h * dt.head] + (bias ? bias[h] : 0.0f);
                if (with_softplus) now = softplus(now);
                delta[r] = std::min(std::max(now, low), high);
                decay[r] = std::exp(delta[r] * a[h]);
                std::copy_n(b.first + t * b.row + h / group * b.head, n_dim, bs + r * wide);
                std::copy_n(c.first + t * c.row + h / group * c.head, n_dim, cs + r * wide);
            }
            for (int64_t first = 0; first < p_dim; first += TOGETHER) {
                const int64_t count = std::min<int64_t>(TOGETHER, p_dim - first);
                for (int64_t p = 0; p < count; p++) std::copy_n(state + (first + p) * n_dim, n_dim, own + p * wide);
                for (int64_t r = 0; r < rows; r++) {
                    const int64_t t = from + r;
                    const float* in = x.first + t * x.row + h * x.head + first;
                    f32v sums[TOGETHER] = {}, write[TOGETHER] = {};
                    for (int64_t p = 0; p < count; p++) write[p] = splat(delta[r] * in[p]);
                    const f32v kept = splat(decay[r]);
                    for (int64_t i = 0; i < wide; i += W) {
                        const f32v bi = load<f32v>(bs + r * wide + i), ci = load<f32v>(cs + r * wide + i);
                        for (int p = 0; p < TOGETHER; p++) {
                            float* at = own + p * wide + i;
                            const f32v now = fma(write[p], bi, load<f32v>(at) * kept);
                            store(at, now);
                            sums[p] = fma(now, ci, sums[p]);
                        }
                    }
                    float* out = y + (t * heads + h) * p_dim + first;
                    for (int64_t p = 0; p < count; p++) out[p] = sum(sums[p]) + (d ? d[h] * in[p] : 0.0f);
                }
                for (int64_t p = 0; p < count; p++) std::copy_n(own + p * wide, n_dim, state + (first + p) * n_dim);
            }
        }
    });
}

void selective_scan(const Step& step, Rows x, Rows dt, Rows b, Rows c, Rows z, const float* a, const float* d,
                    const float* bias, bool with_softplus, int64_t channels, int64_t n_dim, States states, float* y,
                    const Pool& pool) {
    constexpr int64_t CHANNELS = 16;  // that a thread takes at a time
    const int64_t pieces = (channels + CHANNELS - 1) / CHANNELS;
    parallel(pool, step.sequences * pieces, step.starts[step.sequences] * channels * n_dim > SMALL, [&](int64_t item) {
        const int64_t s = item / pieces, first = item % pieces * CHANNELS;
        float* state = states.first + step.slots[s] * states.stride;
        for (int64_t h = first; h < std::min(channels, first + CHANNELS); h++)
            for (int64_t t = step.starts[s]; t < step.starts[s + 1]; t++) {
                const float in = x.first[t * x.row + h * x.head];
                float delta = dt.first[t * dt.row + h * dt.head] + (bias ? bias[h] : 0.0f);
                if (with_softplus) delta = softplus(delta);
                const f32v write = splat(delta * in), rate = splat(delta * LOG2E);
                f32v read = {};
                each_vector(n_dim, [&](int64_t i, int some) {
                    float* at = state + h * n_dim + i;
                    const f32v decay = exp2(rate * load_some(a + h * n_dim + i, some));
                    const f32v now = fma(write, load_some(b.first + t * b.row + i, some), load_some(at, some) * decay);
                    store_some(at, now, some);
                    read = fma(now, load_some(c.first + t * c.row + i, some), read);
                });
                float out = sum(read) + (d ? d[h] * in : 0.0f);
                if (z.first) {
                    const float gate = z.first[t * z.row + h * z.head];
                    out *= gate / (1 + std::exp(-gate));
                }
                y[t * channels + h] = out;
            }
    });
}

}  // namespace octavo::recurrences::ISA
