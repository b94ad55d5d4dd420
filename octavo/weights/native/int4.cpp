// Products with 4-bit weights. Compiled once for each instruction set (see CMakeLists.txt and simd.h).
//
// Of one output and one group of inputs that share a scale s and a zero z:
//
//     Σ x·(code − z)·s = s·(c·(128·Σ high·code + Σ low·code) − z·Σ x)
//
// where a row's inputs of the group are x = c·(128·high + low): two int8 (15 bits, relative to their own largest), and
// both sums are exact in int32. So weights stay packed until they are in registers, every instruction set has a fast
// product of bytes, and an answer does not depend on how many rows are computed together.
#include "int4.h"

#include <cmath>
#include <limits>
#include <memory>

#include "parallel.h"
#include "simd.h"

namespace octavo::weights::ISA {
namespace {

using namespace octavo::ISA;

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int PANEL = 8;  // rows that share a pass over the weights: as many accumulators as there are registers for
#else
constexpr int PANEL = 4;
#endif
constexpr int COLUMNS = TILE / W;  // registers of a tile
constexpr float LARGEST = 127 * 128 + 63;  // 128·high + low with both in int8
constexpr int64_t SMALL = 1 << 16;  // products: fewer are not worth waking a thread for
constexpr int64_t CACHED = 1 << 18;  // bytes of codes that many rows pass over while they are near

// acc[i] + Σ_{j<4} code[4i+j]·x[4i+j] of codes below 16.
inline i32v dot(i32v acc, u8v code, u8v x) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
    // No pair of such products saturates int16.
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)code, (__m256i)x);
    return acc + (i32v)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (i32v)vdotq_s32((int32x4_t)acc, (int8x16_t)code, (int8x16_t)x);
#else
    return dot4(acc, code, x);
#endif
}

// W numbers below 256.
inline f32v load_codes(const uint8_t* p) {
    typedef uint8_t u8q __attribute__((vector_size(W)));
    return __builtin_convertvector(load<u8q>(p), f32v);
}

// Rows of x as the product reads them. A panel of R ≤ PANEL rows holds, for every eight inputs and row, 16 bytes: high
// and low of the first four, then of the last four; and for every group and row its scale and sum.
struct Inputs {
    int64_t rows, in, groups;
    std::unique_ptr<uint8_t[]> bytes;
    std::unique_ptr<float[]> scale, sum;

    Inputs(int64_t rows, const Matrix& m)
        : rows(rows), in(m.in), groups(m.in / m.group), bytes(new uint8_t[2 * rows * in]),
          scale(new float[rows * groups]), sum(new float[rows * groups]) {}
    int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
    int height(int64_t panel) const { return int(std::min<int64_t>(PANEL, rows - panel * PANEL)); }
};

// One row's n ≤ 128 inputs of a group; `to` is the row's place in its panel of that height.
template <class T>
void take_group(const T* x, int n, int height, uint8_t* to, float& scale, float& sum) {
    f32v largest{}, wrong{};  // v − v is NaN where v is not finite
    for (int i = 0; i < n; i += W) {
        const f32v v = load_float(x + i);
        largest = max(largest, max(v, -v));
        wrong += v - v;
    }
    const float most = max(largest), scaled = most > 1e-30f ? LARGEST / most : 0;
    const f32v magic = splat(0x1.8p23f);  // adding it rounds to an integer
    uint8_t high[128], low[128];
    i32v total{};
    for (int i = 0; i < n; i += W) {
        const i32v q = __builtin_convertvector((load_float(x + i) * scaled + magic) - magic, i32v);
        const i32v h = (q + 64) >> 7;
        store_bytes(high + i, h);
        store_bytes(low + i, q - (h << 7));
        total += q;
    }
    for (int i = 0; i < n; i += 4, to += i % 8 ? 8 : 16 * height - 8) {
        std::memcpy(to, high + i, 4);
        std::memcpy(to + 4, low + i, 4);
    }
    scale = (scaled > 0 ? most / LARGEST : 0) + ISA::sum(wrong);
    sum = scale * ISA::sum(to_float(total));
}

template <class T>
void take_panel(const Matrix& m, const T* x, int64_t stride, int64_t panel, Inputs& inputs) {
    const int64_t first = panel * PANEL;
    const int height = inputs.height(panel);
    for (int r = 0; r < height; r++) {
        const T* row = x + (first + r) * stride;
        for (int64_t g = 0; g < inputs.groups; g++) {
            const int64_t at = first * inputs.groups + g * height + r;
            uint8_t* to = inputs.bytes.get() + 2 * first * m.in + g * m.group * 2 * height + 16 * r;
            take_group(row + g * m.group, m.group, height, to, inputs.scale[at], inputs.sum[at]);
        }
    }
}

// W outputs of a tile, from lane `column·W`, for R rows: to y[r·TILE].
template <int R, class S>
void product(const Matrix& m, int64_t tile, int column, const uint8_t* x, const float* scale, const float* sum,
             float* y) {
    constexpr int CHAINS = R > 2 ? 1 : 2;  // so few rows would wait for their own sums
    const int64_t groups = m.in / m.group, place = column * W;
    const uint8_t* codes = m.codes + tile * TILE * m.in / 2 + 4 * place;
    f32v out[R] = {};
    for (int64_t g = 0; g < groups; g++, scale += R, sum += R) {
        i32v high[CHAINS][R] = {}, low[CHAINS][R] = {};
        for (int i = 0; i < m.group; i += 8, codes += 4 * TILE, x += 16 * R) {
            const u8v both = load<u8v>(codes), first = both & 15, last = both >> 4;
            for (int r = 0; r < R; r++) {
                high[0][r] = dot(high[0][r], first, splat4(x + 16 * r));
                low[0][r] = dot(low[0][r], first, splat4(x + 16 * r + 4));
            }
            for (int r = 0; r < R; r++) {
                high[CHAINS - 1][r] = dot(high[CHAINS - 1][r], last, splat4(x + 16 * r + 8));
                low[CHAINS - 1][r] = dot(low[CHAINS - 1][r], last, splat4(x + 16 * r + 12));
            }
        }
        const int64_t at = (tile * groups + g) * TILE + place;
        const f32v s = load_float(static_cast<const S*>(m.scales) + at);
        const f32v z = load_codes(m.zeros + at);
        for (int r = 0; r < R; r++) {
            i32v h = high[0][r], l = low[0][r];
            if (CHAINS == 2) h += high[1][r], l += low[1][r];
            out[r] += s * (to_float((h << 7) + l) * scale[r] - z * sum[r]);
        }
    }
    for (int r = 0; r < R; r++) store(y + r * TILE + place, out[r]);
}

template <class T>
void finish(const Matrix& m, int64_t tile, int rows, const float* y, const T* bias, T* out) {
    const int64_t first = tile * TILE, n = std::min<int64_t>(TILE, m.out - first);
    for (int r = 0; r < rows; r++)
        for (int64_t o = 0; o < n; o++)
            from_float(y[r * TILE + o] + (bias ? to_float(bias[first + o]) : 0), out[r * m.out + first + o]);
}

void multiply(const Matrix& m, const void* x, int64_t rows, int64_t stride, Float type, const void* bias, void* y,
              const Pool& pool) {
    Inputs inputs(rows, m);
    with_float(type, [&](auto kind) {
        using T = decltype(kind);
        parallel(pool, inputs.panels(), rows * m.in >= SMALL, [&](int64_t panel) {
            take_panel(m, static_cast<const T*>(x), stride, panel, inputs);
        });
    });
    const int64_t tiles = (m.out + TILE - 1) / TILE, near = std::max<int64_t>(1, CACHED / (TILE * m.in / 2));
    const int64_t chunk = std::min(near, std::max<int64_t>(1, tiles / (4 * pool.threads)));
    parallel(pool, (tiles + chunk - 1) / chunk, rows * m.in * m.out >= SMALL, [&](int64_t item) {
        const int64_t end = std::min(tiles, (item + 1) * chunk);
        for (int64_t panel = 0; panel < inputs.panels(); panel++) {
            const int64_t first = panel * PANEL;
            const int height = inputs.height(panel);
            const uint8_t* bytes = inputs.bytes.get() + 2 * first * m.in;
            const float* scale = inputs.scale.get() + first * inputs.groups;
            const float* sum = inputs.sum.get() + first * inputs.groups;
            for (int64_t tile = item * chunk; tile < end; tile++) {
                float out[PANEL * TILE];
                with_float(m.scale, [&](auto s) {
                    with_constant<PANEL>(height, [&](auto rows) {
                        for (int column = 0; column < COLUMNS; column++)
                            product<decltype(rows)::value, decltype(s)>(m, tile, column, bytes, scale, sum, out);
                    });
                });
                with_float(type, [&](auto kind) {
                    using T = decltype(kind);
                    finish(m, tile, height, out, static_cast<const T*>(bias), static_cast<T*>(y) + first * m.out);
                });
            }
        }
    });
}

void decode(const Matrix& m, int64_t first, int64_t count, Float type, void* w, const Pool& pool) {
    const int64_t groups = m.in / m.group;
    parallel(pool, (count + TILE - 1) / TILE, count * m.in >= SMALL, [&](int64_t item) {
        const int64_t tile = first / TILE + item, here = std::min<int64_t>(TILE, count - item * TILE);
        for (int64_t o = 0; o < here; o++)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t at = (tile * groups + g) * TILE + o;
                float s = 0;
                with_float(m.scale, [&](auto kind) { s = to_float(static_cast<const decltype(kind)*>(m.scales)[at]); });
                with_float(type, [&](auto kind) {
                    decltype(kind) value[16];
                    for (int code = 0; code < 16; code++) from_float(float(code - m.zeros[at]) * s, value[code]);
                    auto* to = static_cast<decltype(kind)*>(w) + (item * TILE + o) * m.in + g * m.group;
                    const uint8_t* codes = m.codes + (tile * m.in + g * m.group) * TILE / 2 + 4 * o;
                    for (int i = 0; i < m.group; i += 8, codes += 4 * TILE)
                        for (int j = 0; j < 4; j++) to[i + j] = value[codes[j] & 15], to[i + j + 4] = value[codes[j] >> 4];
                });
            }
    });
}

}  // namespace

extern const Int4Kernels int4;
const Int4Kernels int4 = {multiply, decode};

}  // namespace octavo::weights::ISA
