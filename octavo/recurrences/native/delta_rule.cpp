// The gated delta rule, row after row for each sequence and head: the same sums in the same order, however a sequence was
// cut into steps. Columns of a state are independent of each other, so they are taken a few registers at a time, from
// a copy that stays in the first cache for a tile of rows.
#include "kernels.h"

namespace octavo::recurrences::ISA {
namespace {

constexpr int COLUMNS = 4;  // registers of columns
constexpr int64_t WIDTH = COLUMNS * W;

// One row: S [k_dim, WIDTH] goes on, `y` is what q reads of it.
inline void step_row(float* s, int64_t k_dim, const float* q, const float* k, const float* decay, f32v beta,
                     const f32v (&v)[COLUMNS], f32v (&y)[COLUMNS]) {
    f32v held[2][COLUMNS] = {}, change[COLUMNS];
    for (int64_t i = 0; i < k_dim; i++) {
        const f32v read = splat(k[i] * decay[i]);
        f32v(&sum)[COLUMNS] = held[i & 1];
        for (int c = 0; c < COLUMNS; c++) sum[c] = fma(read, load<f32v>(s + i * WIDTH + c * W), sum[c]);
    }
    for (int c = 0; c < COLUMNS; c++) {
        change[c] = (v[c] - (held[0][c] + held[1][c])) * beta;
        y[c] = f32v{};
    }
    for (int64_t i = 0; i < k_dim; i++) {
        const f32v kept = splat(decay[i]), write = splat(k[i]), read = splat(q[i]);
        for (int c = 0; c < COLUMNS; c++) {
            float* at = s + i * WIDTH + c * W;
            const f32v now = fma(write, change[c], load<f32v>(at) * kept);
            store(at, now);
            y[c] = fma(read, now, y[c]);
        }
    }
}

inline void normalized(const float* x, int64_t dim, bool normalize, float scale, float* out) {
    if (normalize) {
        float squares = 0;
        for (int64_t i = 0; i < dim; i++) squares = std::fma(x[i], x[i], squares);
        scale /= std::sqrt(squares + 1e-6f);
    }
    for (int64_t i = 0; i < dim; i++) out[i] = x[i] * scale;
}

}  // namespace

void delta_rule(const Step& step, Rows q, Rows k, Rows v, Rows g, Rows beta, int64_t heads, int64_t group, int64_t k_dim,
                int64_t v_dim, bool by_channel, bool normalize, States states, float* y, const Pool& pool) {
    const float scale = 1 / std::sqrt(float(k_dim));
    parallel(pool, step.sequences * heads, step.starts[step.sequences] * heads * k_dim * v_dim > SMALL, [&](int64_t item) {
        const int64_t s = item / heads, h = item % heads;
        float* state = states.first + step.slots[s] * states.stride + h * k_dim * v_dim;
        thread_local std::vector<float> scratch;
        scratch.resize(3 * TILE * k_dim + k_dim * WIDTH);
        float *qs = scratch.data(), *ks = qs + TILE * k_dim, *decays = ks + TILE * k_dim, *own = decays + TILE * k_dim;
        for (int64_t from = step.starts[s]; from < step.starts[s + 1]; from += TILE) {
            const int64_t rows = std::min(TILE, step.starts[s + 1] - from);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t t = from + r;
                normalized(q.first + t * q.row + h / group * q.head, k_dim, normalize, scale, qs + r * k_dim);
                normalized(k.first + t * k.row + h / group * k.head, k_dim, normalize, 1, ks + r * k_dim);
                const float* gate = g.first + t * g.row + h * g.head;
                if (by_channel)
                    for (int64_t i = 0; i < k_dim; i++) decays[r * k_dim + i] = std::exp(gate[i]);
                else std::fill_n(decays + r * k_dim, k_dim, std::exp(*gate));
            }
            for (int64_t first = 0; first < v_dim; first += WIDTH) {
                const int64_t count = std::min(WIDTH, v_dim - first);
                if (count < WIDTH) std::fill_n(own, k_dim * WIDTH, 0.0f);
                for (int64_t i = 0; i < k_dim; i++) std::copy_n(state + i * v_dim + first, count, own + i * WIDTH);
                for (int64_t r = 0; r < rows; r++) {
                    const int64_t t = from + r;
                    float wide[WIDTH] = {};
                    std::copy_n(v.first + t * v.row + h * v.head + first, count, wide);
                    f32v values[COLUMNS], out[COLUMNS];
                    for (int c = 0; c < COLUMNS; c++) values[c] = load<f32v>(wide + c * W);
                    step_row(own, k_dim, qs + r * k_dim, ks + r * k_dim, decays + r * k_dim,
                             splat(beta.first[t * beta.row + h * beta.head]), values, out);
                    for (int c = 0; c < COLUMNS; c++) store(wide + c * W, out[c]);
                    std::copy_n(wide, count, y + (t * heads + h) * v_dim + first);
                }
                for (int64_t i = 0; i < k_dim; i++) std::copy_n(own + i * WIDTH, count, state + i * v_dim + first);
            }
        }
    });
}

}  // namespace octavo::recurrences::ISA
