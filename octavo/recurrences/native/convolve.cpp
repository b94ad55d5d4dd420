// Short convolutions over the rows of each sequence, for all sequences of a step in one pass.
#include "kernels.h"

namespace octavo::recurrences::ISA {
namespace {

constexpr int64_t CHANNELS = 64;  // that a thread takes at a time

}  // namespace

void convolve(const Step& step, Rows x, int64_t channels, const float* weight, int64_t taps, const float* bias,
              bool with_silu, States states, int64_t kept, float* y, const Pool& pool) {
    const int64_t pieces = (channels + CHANNELS - 1) / CHANNELS, before = taps - 1;
    const int64_t rows = step.starts[step.sequences];
    parallel(pool, step.sequences * pieces, rows * channels > SMALL, [&](int64_t item) {
        const int64_t s = item / pieces, first = item % pieces * CHANNELS;
        const int64_t count = std::min(CHANNELS, channels - first);
        const int64_t n = step.starts[s + 1] - step.starts[s];
        if (!n) return;
        const float* in = x.first + step.starts[s] * x.row + first;
        float* out = y + step.starts[s] * channels + first;
        float* state = states.first + step.slots[s] * states.stride + first * kept;
        thread_local std::vector<float> scratch;
        scratch.assign((before + taps) * CHANNELS, 0);
        float *past = scratch.data(), *w = past + before * CHANNELS;  // by row, then channel
        for (int64_t c = 0; c < count; c++) {
            for (int64_t j = 0; j < before; j++) past[j * CHANNELS + c] = state[c * kept + kept - before + j];
            for (int64_t j = 0; j < taps; j++) w[j * CHANNELS + c] = weight[(first + c) * taps + j];
        }
        const auto row = [&](int64_t t) { return t < 0 ? past + (t + before) * CHANNELS : in + t * x.row; };
        for (int64_t t = 0; t < n; t++)
            each_vector(count, [&](int64_t i, int some) {
                f32v sum = bias ? load_some(bias + first + i, some) : f32v{};
                for (int64_t j = 0; j < taps; j++)
                    sum = fma(load_some(row(t - before + j) + i, some), load<f32v>(w + j * CHANNELS + i), sum);
                store_some(out + t * channels + i, with_silu ? silu(sum) : sum, some);
            });
        for (int64_t c = 0; c < count; c++)
            for (int64_t j = 0; j < kept; j++) {
                const int64_t t = n - kept + j;
                state[c * kept + j] = t < 0 ? state[c * kept + j + n] : in[t * x.row + c];
            }
    });
}

}  // namespace octavo::recurrences::ISA
