// Products with 16- and 32-bit weights in float32. Compiled once for each instruction set (see CMakeLists.txt, simd.h).
//
// Every element of y is summed in one order: the inputs in blocks of CHAIN, each block one chain of fused multiply-adds
// in ascending k that starts from 0, the blocks' sums added in ascending order, and the bias last. Which rows share a
// pass, how rows and columns are cut, and which thread computes what change nothing of that: a row's bits do not depend
// on its company, and are the same with every instruction set that has fused multiply-adds.
//
// As many rows as there are registers for share one pass over the weights, which are widened in registers. More go in
// groups over a tile of weights, CHAIN inputs of some panels: the first group reads it into the nearest cache. For many
// groups it is widened once, into that cache. While a tile is multiplied, the next is fetched.
#include "panels.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "parallel.h"
#include "simd.h"

namespace octavo::weights::ISA {
namespace {

using namespace octavo::ISA;

constexpr int64_t CHAIN = 512;
constexpr int64_t LINE = CHAIN + 16;  // floats from row to row of inputs: not a power of 2, whose rows would share a set
#if defined(__AVX512F__)
constexpr int ROWS = 12, REGISTERS = 2;  // the kernel's accumulators, as there are registers for
#elif defined(__ARM_NEON)
constexpr int ROWS = 6, REGISTERS = 4;
#elif defined(__AVX2__)
constexpr int ROWS = 6, REGISTERS = 2;
#else
constexpr int ROWS = 3, REGISTERS = 4;
#endif
constexpr int WIDE = PANEL / W;           // registers of a panel
constexpr int COLUMNS = REGISTERS * W;    // of a tile
constexpr int TOGETHER = COLUMNS / PANEL; // its panels
constexpr int DIRECT = 8;                 // groups of ROWS rows, at most, that widen weights each for itself
constexpr int64_t BLOCK = 192;            // rows that meet a tile: BLOCK × CHAIN floats fit a core's second cache
constexpr int64_t PIECES = 2;             // of work, at least, for each thread
constexpr int64_t NARROWEST = 8, WIDEST = 128;  // tiles of a piece: each piece takes its inputs anew
constexpr int64_t SMALL = 1 << 16;        // products: fewer are not worth waking a thread for
constexpr int64_t NEXT = 4;               // rows of inputs that are fetched ahead
constexpr int64_t AHEAD = 512;            // weights from what is read to what is fetched
constexpr int64_t STRIDE = 16;            // inputs from one fetch to the next
static_assert(COLUMNS % PANEL == 0);

constexpr int floor_power_of_2(int n) { return n < 2 ? 1 : 2 * floor_power_of_2(n / 2); }

template <class F>
void with_type(Float type, F&& f) {
    if (type == Float::BF16) f(bf16{});
    else if (type == Float::FP16) f(fp16{});
    else f(float{});
}

// Memory of a thread, kept from call to call.
class Scratch {
public:
    float* take(int64_t count) {
        if (count > size) {
            memory.reset(new float[count + LINE]);
            size = count;
        }
        const uint64_t start = reinterpret_cast<uint64_t>(memory.get());
        return memory.get() + (-start % (4 * LINE)) / 4;
    }

private:
    static constexpr int LINE = 16;
    std::unique_ptr<float[]> memory;
    int64_t size = 0;
};
thread_local Scratch scratch;

// `total` in `count` parts, as equal as they can be.
struct Parts {
    int64_t total, count;
    static Parts of_at_most(int64_t total, int64_t most) { return {total, (total + most - 1) / most}; }
    int64_t first(int64_t part) const { return total * part / count; }
    int64_t size(int64_t part) const { return first(part + 1) - first(part); }
};

// What is multiplied with the weights, and where it goes.
struct Rows {
    const void* x;
    int64_t count, stride;
    Float type;  // of x, bias and y
    const void* bias;
    void* y;

    // `height` rows from `first`, n ≤ CHAIN inputs of each from k, as floats, LINE apart.
    void take(int64_t first, int64_t height, int64_t k, int64_t n, float* to) const {
        with_type(type, [&](auto kind) {
            for (int64_t r = 0; r < height; r++, to += LINE) {
                const auto* from = static_cast<const decltype(kind)*>(x) + (first + r) * stride + k;
                const auto* later = from + std::min(NEXT, height - 1 - r) * stride;
                int64_t i = 0;
                for (; i + W <= n; i += W) {
                    __builtin_prefetch(later + i);
                    store(to + i, load_float(from + i));
                }
                for (; i < n; i++) to[i] = to_float(from[i]);
            }
        });
    }
    // Sums c [rows, row] of outputs from `begin` on, at most n, to y with the bias.
    void finish(const Panels& m, const float* c, int64_t row, int64_t first, int64_t rows, int64_t begin,
                int64_t n) const {
        n = std::min(n, m.out - begin);
        with_type(type, [&](auto kind) {
            using T = decltype(kind);
            const T* shift = bias ? static_cast<const T*>(bias) + begin : nullptr;
            for (int64_t r = 0; r < rows; r++, c += row) {
                T* to = static_cast<T*>(y) + (first + r) * m.out + begin;
                for (int64_t o = 0; o < n; o++) from_float(shift ? c[o] + to_float(shift[o]) : c[o], to[o]);
            }
        });
    }
};

// Fetch `bytes` of memory that is read soon. A little at a time: more than a core can wait for would stall it.
inline void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// One chain for R rows and C registers of columns: x [R, LINE], panels of w `apart` elements from one to the next.
// c [R, row] becomes the sums, or has them added. Before input k of every STRIDE, ahead(k) fetches what is read later.
template <int R, int C, class T, class Ahead>
inline void chain(const float* x, const T* w, int64_t apart, int64_t n, bool first, float* c, int64_t row,
                  Ahead ahead) {
    f32v sum[R][C] = {};
    for (int64_t k = 0; k < n; k += STRIDE) {
        ahead(k);
        const int64_t steps = std::min(STRIDE, n - k);
#pragma GCC unroll 2
        for (int64_t i = 0; i < steps; i++, x++, w += PANEL) {
            f32v b[C];
#pragma GCC unroll 16
            for (int j = 0; j < C; j++) b[j] = load_float(w + j / WIDE * apart + j % WIDE * W);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                const f32v a = splat(x[r * LINE]);
#pragma GCC unroll 16
                for (int j = 0; j < C; j++) sum[r][j] = fma(a, b[j], sum[r][j]);
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int j = 0; j < C; j++) {
            float* to = c + r * row + j * W;
            store(to, first ? sum[r][j] : load<f32v>(to) + sum[r][j]);
        }
}

// A chain of TOGETHER panels for `height` ≤ ROWS rows.
template <int R = ROWS, class T, class Ahead>
void group_chain(int64_t height, const float* x, const T* w, int64_t apart, int64_t n, bool first, float* c,
                 Ahead ahead) {
    if constexpr (R > 1)
        if (height < R) return group_chain<R - 1>(height, x, w, apart, n, first, c, ahead);
    for (int i = 0; i < R * COLUMNS; i += 16) __builtin_prefetch(c + i, 1);
    chain<R, REGISTERS>(x, w, apart, n, first, c, COLUMNS, ahead);
}

// Few rows: x [chains, R, LINE].
template <int R, class T>
void few(const Panels& m, const Rows& rows, const float* x, const Pool& pool) {
    constexpr int SIDE = floor_power_of_2(std::min(ROWS * REGISTERS / R, 8)) / WIDE;  // panels there are registers for
    const int64_t panels = (m.out + PANEL - 1) / PANEL;
    const int64_t each = std::max<int64_t>(1, panels / (8 * pool.threads) / 4) * 4;
    const T* weight = static_cast<const T*>(m.weight);
    parallel(pool, (panels + each - 1) / each, R * m.in * m.out >= SMALL, [&](int64_t item) {
        const int64_t end = std::min(panels, (item + 1) * each);
        int64_t p = item * each;
        const auto side_by_side = [&](auto panels) {
            constexpr int P = decltype(panels)::value;
            alignas(64) float sums[R * P * PANEL];
            for (int64_t k = 0; k < m.in; k += CHAIN) {
                const T* w = weight + (p * m.in + k) * PANEL;
                const auto ahead = [=](int64_t i) {
                    for (int64_t j = 0; j < P; j++) fetch(w + (j * m.in + i) * PANEL + AHEAD, STRIDE * PANEL * sizeof(T));
                };
                chain<R, P * WIDE>(x + k / CHAIN * R * LINE, w, m.in * PANEL, std::min(CHAIN, m.in - k), k == 0, sums,
                                   P * PANEL, ahead);
            }
            rows.finish(m, sums, P * PANEL, 0, R, p * PANEL, P * PANEL);
            p += P;
        };
        while (p + SIDE <= end) side_by_side(std::integral_constant<int, SIDE>{});
        while (p < end) side_by_side(std::integral_constant<int, 1>{});
    });
}

template <class T, int R = ROWS>
void few(const Panels& m, const Rows& rows, const float* x, const Pool& pool) {
    if constexpr (R > 1)
        if (rows.count < R) return few<T, R - 1>(m, rows, x, pool);
    few<R, T>(m, rows, x, pool);
}

// The weights of tile `at` from input k on, in its first panel.
template <class T>
const T* weights_of(const Panels& m, int64_t at, int64_t k) {
    return static_cast<const T*>(m.weight) + (at * TOGETHER * m.in + k) * PANEL;
}

// Many rows: a block of them and a range of tiles at a time.
template <class T>
void many(const Panels& m, const Rows& rows, const Pool& pool) {
    const int64_t panels = (m.out + PANEL - 1) / PANEL, tiles = (panels + TOGETHER - 1) / TOGETHER;
    const Parts blocks = Parts::of_at_most(rows.count, BLOCK);
    // Pieces are of one size, and their number a multiple of the threads'.
    const int64_t step = pool.threads / std::gcd(blocks.count, int64_t(pool.threads));
    const int64_t wanted = std::max((PIECES * pool.threads - 1) / blocks.count + 1, (tiles - 1) / WIDEST + 1);
    const Parts ranges{tiles, std::min((wanted + step - 1) / step * step, (tiles - 1) / NARROWEST + 1)};
    parallel(pool, blocks.count * ranges.count, rows.count * m.in * m.out >= SMALL, [&](int64_t item) {
        const int64_t block = item % blocks.count, range = item / blocks.count;
        const int64_t height = blocks.size(block), begin = ranges.first(range), end = ranges.first(range + 1);
        const Parts groups = Parts::of_at_most(height, ROWS);
        const bool direct = groups.count <= DIRECT;
        float* tile = scratch.take(CHAIN * COLUMNS + height * (LINE + (end - begin) * COLUMNS));
        float* inputs = tile + CHAIN * COLUMNS;
        float* sums = inputs + height * LINE;  // [end − begin, height, COLUMNS]
        for (int64_t k = 0; k < m.in; k += CHAIN) {
            const int64_t n = std::min(CHAIN, m.in - k);
            rows.take(blocks.first(block), height, k, n, inputs);
            float* c = sums;
            for (int64_t at = begin; at < end; at++, c += height * COLUMNS) {
                const T* w = weights_of<T>(m, at, k);
                const T* next = at + 1 < end ? weights_of<T>(m, at + 1, k) : weights_of<T>(m, begin, k + n);
                // A panel that is not there is computed from another, and not kept.
                const int64_t apart = (at + 1) * TOGETHER <= panels ? m.in * PANEL : 0;
                if (!direct)
                    for (int t = 0; t < TOGETHER; t++)
                        for (int64_t i = 0; i < n * PANEL; i += W)
                            store(tile + t * n * PANEL + i, load_float(w + t * apart + i));
                for (int64_t g = 0; g < groups.count; g++) {
                    const float* x = inputs + groups.first(g) * LINE;
                    float* to = c + groups.first(g) * COLUMNS;
                    // Each group fetches its share of the next tile.
                    const T* share = next + g * n / groups.count * PANEL;
                    const int64_t each = STRIDE * PANEL / groups.count;
                    const auto ahead = [=](int64_t i) {
                        for (int t = 0; t < TOGETHER; t++)
                            fetch(share + t * m.in * PANEL + i / STRIDE * each, each * int64_t(sizeof(T)));
                    };
                    if (direct) group_chain(groups.size(g), x, w, apart, n, k == 0, to, ahead);
                    else group_chain(groups.size(g), x, tile, n * PANEL, n, k == 0, to, ahead);
                }
            }
        }
        for (int64_t at = begin; at < end; at++, sums += height * COLUMNS)
            rows.finish(m, sums, COLUMNS, blocks.first(block), height, at * COLUMNS, COLUMNS);
    });
}

void multiply(const Panels& m, const void* x, int64_t count, int64_t stride, Float type, const void* bias, void* y,
              const Pool& pool) {
    if (count == 0) return;
    const Rows rows{x, count, stride, type, bias, y};
    with_type(m.type, [&](auto weight) {
        using T = decltype(weight);
        if (count > ROWS) return many<T>(m, rows, pool);
        float* inputs = scratch.take((m.in + CHAIN - 1) / CHAIN * count * LINE);
        for (int64_t k = 0; k < m.in; k += CHAIN)
            rows.take(0, count, k, std::min(CHAIN, m.in - k), inputs + k / CHAIN * count * LINE);
        few<T>(m, rows, inputs, pool);
    });
}

template <class T>
void pack(const T* w, int64_t out, int64_t in, int64_t stride, T* panels, const Pool& pool) {
    parallel(pool, (out + PANEL - 1) / PANEL, out * in >= SMALL, [&](int64_t panel) {
        const int64_t begin = panel * PANEL, height = std::min<int64_t>(PANEL, out - begin);
        T* to = panels + begin * in;
        for (int64_t k = 0; k < in; k++)
            for (int64_t o = 0; o < PANEL; o++) to[k * PANEL + o] = o < height ? w[(begin + o) * stride + k] : T(0);
    });
}

void pack(const void* w, int64_t out, int64_t in, int64_t stride, int bytes, void* panels, const Pool& pool) {
    if (bytes == 2) pack(static_cast<const uint16_t*>(w), out, in, stride, static_cast<uint16_t*>(panels), pool);
    else pack(static_cast<const uint32_t*>(w), out, in, stride, static_cast<uint32_t*>(panels), pool);
}

int64_t spin(int64_t steps, const Pool& pool) {
    constexpr int ALL = ROWS * REGISTERS;
    parallel(pool, pool.threads, true, [&](int64_t) {
        f32v sum[ALL], a = splat(0.999f), b = splat(0.001f);
        for (int i = 0; i < ALL; i++) sum[i] = splat(float(i));
        for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 32
            for (int i = 0; i < ALL; i++) sum[i] = fma(sum[i], a, b);
        for (int i = 1; i < ALL; i++) sum[0] += sum[i];
        volatile float kept = ISA::sum(sum[0]);  // or nothing would be computed
        (void)kept;
    });
    return 2 * ALL * W * steps * pool.threads;
}

}  // namespace

extern const PanelKernels panels;
const PanelKernels panels = {multiply, pack, spin};

}  // namespace octavo::weights::ISA
