// Products with 16- and 32-bit weights, summed in float32. Compiled once for each instruction set (see CMakeLists.txt, simd.h).
//
// Every element of y is summed in one order: the inputs in blocks of CHAIN, each block one chain of fused multiply-adds
// in ascending k that starts from 0, the blocks' sums added in ascending order, and the bias last. Which rows share a
// pass, how rows and columns are cut, and which thread computes what change nothing of that: a row's bits do not depend
// on its company, and are the same with every instruction set that has fused multiply-adds.
//
// As many rows as there are registers for share one pass over the weights, which are widened in registers. More go in
// groups over a tile of weights, CHAIN inputs of some panels: the first group reads it into the nearest cache. For many
// groups it is widened once, into that cache. While a tile is multiplied, the next is fetched.
//
// Where the processor has a matrix unit (tiles.h), pairs are multiplied by it, however few the rows; its sums of 16 pairs
// take the place of one multiply-add each.
//
// Several weights that multiply the same rows share one pass over them. Of a gate and what it opens, tiles take turns, so
// that the two products meet before they leave the cache.
#include "panels.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "tiles.h"
#include "vectors.h"

namespace octavo::weights::ISA {
namespace {

using namespace octavo::ISA;

constexpr int64_t CHAIN = 512;  // steps
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

thread_local Scratch scratch;

// A step of a chain: one input and its weight, or where the processor multiplies them a pair of bf16 numbers, four bytes too.
struct Pair { uint32_t bits; };
struct TilePair : Pair {};  // for the matrix unit
template <class T>
constexpr int INPUTS = std::is_base_of_v<Pair, T> ? 2 : 1;  // of a step
template <class T>
constexpr bool BY_TILES = std::is_same_v<T, TilePair>;  // in groups of two tiles of rows

#if defined(__AVX512F__)
constexpr bool PAIRS = true;
// By their names in assembly: older compilers, and this file's flags, do not know the instructions.
inline f32v multiply_add(Pair, f32v x, f32v w, f32v sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
}
inline f32v pairs_of(f32v first, f32v later) {  // of 2·W neighbours, rounded to even
    f32v pairs;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(first), "v"(later));
    return pairs;
}
#else
constexpr bool PAIRS = false;
inline f32v multiply_add(Pair, f32v, f32v, f32v sum) { return sum; }
inline f32v pairs_of(f32v first, f32v) { return first; }
#endif
template <class T>
inline f32v multiply_add(T, f32v x, f32v w, f32v sum) { return fma(x, w, sum); }

inline f32v load_float(const Pair* p) { return load<f32v>(p); }  // as they lie
using octavo::ISA::load_float;

// `total` in `count` parts, as equal as they can be.
struct Parts {
    int64_t total, count;
    static Parts of_at_most(int64_t total, int64_t most) { return {total, (total + most - 1) / most}; }
    int64_t first(int64_t part) const { return total * part / count; }
    int64_t size(int64_t part) const { return first(part + 1) - first(part); }
};

// What is multiplied with the weights.
struct Rows {
    const void* x;
    int64_t count, stride;
    Float type;  // of x, biases and y

    // `height` rows from `first`, n ≤ CHAIN steps of each from step k on, LINE apart: inputs as floats, or in pairs.
    template <class T>
    void take(int64_t first, int64_t height, int64_t k, int64_t n, float* to) const {
        with_float(type, [&](auto kind) {
            for (int64_t r = 0; r < height; r++, to += LINE) {
                const auto* from = static_cast<const decltype(kind)*>(x) + (first + r) * stride + k * INPUTS<T>;
                const auto* later = from + std::min(NEXT, height - 1 - r) * stride;
                int64_t i = 0;
                if constexpr (INPUTS<T> == 2) {
                    for (; i + 2 * W <= 2 * n; i += 2 * W) {
                        __builtin_prefetch(later + i);
                        __builtin_prefetch(later + i + W);
                        store(to + i / 2, pairs_of(load_float(from + i), load_float(from + i + W)));
                    }
                    for (; i < 2 * n; i += 2) {
                        bf16 pair[2];
                        for (int j = 0; j < 2; j++) from_float(to_float(from[i + j]), pair[j]);
                        std::memcpy(to + i / 2, pair, sizeof pair);
                    }
                } else {
                    for (; i + W <= n; i += W) {
                        __builtin_prefetch(later + i);
                        store(to + i, load_float(from + i));
                    }
                    for (; i < n; i++) to[i] = to_float(from[i]);
                }
            }
        });
    }
    // Sums c [rows, row] of outputs from `begin` on, at most n, to y with what is added.
    void finish(const Product& p, const float* c, int64_t row, int64_t first, int64_t rows, int64_t begin,
                int64_t n) const {
        n = std::min(n, p.weight.out - begin);
        with_float(type, [&](auto kind) {
            using T = decltype(kind);
            const T* shift = p.bias ? static_cast<const T*>(p.bias) + begin : nullptr;
            for (int64_t r = 0; r < rows; r++, c += row) {
                const int64_t at = (first + r) * p.weight.out + begin;
                T* to = static_cast<T*>(p.y) + at;
                const T* plus = p.plus ? static_cast<const T*>(p.plus) + at : nullptr;
                for (int64_t o = 0; o < n; o++) {
                    const float sum = shift ? c[o] + to_float(shift[o]) : c[o];
                    from_float(plus ? to_float(plus[o]) + sum : sum, to[o]);
                }
            }
        });
    }
    // The same of a gate's sums and those of what it opens, `up`.
    void finish_gated(const Product* p, const float* c, const float* up, int64_t row, int64_t first, int64_t rows,
                      int64_t begin, int64_t n) const {
        n = std::min(n, p->weight.out - begin);
        const float *c_bias = static_cast<const float*>(p[0].bias), *up_bias = static_cast<const float*>(p[1].bias);
        for (int64_t r = 0; r < rows; r++, c += row, up += row) {
            float* to = static_cast<float*>(p->y) + (first + r) * p->weight.out + begin;
            for (int64_t o = 0; o < n; o += W) {
                const int lanes = int(std::min<int64_t>(W, n - o));
                auto biased = [&](const float* sums, const float* bias) {
                    f32v x = load<f32v>(sums + o);
                    for (int i = 0; bias && i < lanes; i++) x[i] += bias[begin + o + i];
                    return x;
                };
                const f32v y = silu(biased(c, c_bias)) * biased(up, up_bias);
                if (lanes == W) store(to + o, y);
                else std::memcpy(to + o, &y, lanes * sizeof(float));
            }
        }
    }
};

// Fetch `bytes` of memory that is read soon. A little at a time: more than a core can wait for would stall it.
inline void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// One chain of n steps for R rows and C registers of columns: x [R, LINE], panels of w `apart` elements from one to the next.
// c [R, row] becomes the sums, or has them added. Before step k of every STRIDE, ahead(k) fetches what is read later.
template <int R, int C, class T, class Ahead>
inline void chain(const float* x, const T* w, int64_t apart, int64_t n, bool first, float* c, int64_t row,
                  Ahead ahead) {
    constexpr int PAIR = R > 1 && WIDE > 1 ? 2 : 1;  // registers that are loaded together
    f32v sum[R][C] = {};
    for (int64_t k = 0; k < n; k += STRIDE) {
        ahead(k);
        const int64_t steps = std::min(STRIDE, n - k);
#pragma GCC unroll 2
        for (int64_t i = 0; i < steps; i++, x++, w += PANEL) {
            f32v b[C];
#pragma GCC unroll 16
            for (int j = 0; j < C; j += PAIR) {
                const T* from = w + j / WIDE * apart + j % WIDE * W;
                if constexpr (PAIR == 2) load_pair(from, b[j], b[j + 1]);
                else b[j] = load_float(from);
            }
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                const f32v a = (f32v)splat(std::bit_cast<int32_t>(x[r * LINE]));
#pragma GCC unroll 16
                for (int j = 0; j < C; j++) sum[r][j] = multiply_add(T{}, a, b[j], sum[r][j]);
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int j = 0; j < C; j++) {
            if constexpr (PAIR == 2)
                if (j % 2 == 0) in_order<T>(sum[r][j], sum[r][j + 1]);
            float* to = c + r * row + j * W;
            store(to, first ? sum[r][j] : load<f32v>(to) + sum[r][j]);
        }
}

// The same by the matrix unit, for R times TILE_ROWS rows and TOGETHER panels, of which there are two; n is a multiple of
// STRIDE.
template <int R, class Ahead>
void tile_chain(const float* x, const Pair* w, int64_t apart, int64_t n, bool first, float* c, Ahead ahead) {
    constexpr int64_t LINES = LINE * sizeof(float), PANELS = PANEL * sizeof(Pair), ROW = COLUMNS * sizeof(float);
    static_assert(TOGETHER == 2 && STRIDE == TILE_ROWS && PANEL == TILE_ROWS && R <= 2);
    float* below = c + TILE_ROWS * COLUMNS;
    if (first) {
        Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
    } else {
        Tiles::load<0>(c, ROW), Tiles::load<1>(c + PANEL, ROW);
        if constexpr (R == 2) Tiles::load<2>(below, ROW), Tiles::load<3>(below + PANEL, ROW);
    }
    for (int64_t k = 0; k < n; k += STRIDE, x += STRIDE, w += STRIDE * PANEL) {
        ahead(k);
        Tiles::load<6>(w, PANELS), Tiles::load<7>(w + apart, PANELS);
        Tiles::load<4>(x, LINES);
        Tiles::multiply_add<0, 4, 6>(), Tiles::multiply_add<1, 4, 7>();
        if constexpr (R == 2) {
            Tiles::load<5>(x + TILE_ROWS * LINE, LINES);
            Tiles::multiply_add<2, 5, 6>(), Tiles::multiply_add<3, 5, 7>();
        }
    }
    Tiles::save<0>(c, ROW), Tiles::save<1>(c + PANEL, ROW);
    if constexpr (R == 2) Tiles::save<2>(below, ROW), Tiles::save<3>(below + PANEL, ROW);
}

// A chain of TOGETHER panels for R rows.
template <int R, class T, class Ahead>
[[gnu::noinline]] void group_chain(const float* x, const T* w, int64_t apart, int64_t n, bool first, float* c, Ahead ahead) {
    for (int i = 0; i < R * COLUMNS; i += 16) __builtin_prefetch(c + i, 1);
    chain<R, REGISTERS>(x, w, apart, n, first, c, COLUMNS, ahead);
}

inline int64_t panels_of(const Panels& m) { return (m.out + PANEL - 1) / PANEL; }

// A call: the products, and what of them is done together: one panel or tile of one weight, or of a gate and its other.
struct Call {
    const Product* products;
    int count;
    bool gated;
    const Rows& rows;
    int64_t in() const { return products->weight.in; }
    int64_t steps() const { return in() / (products->weight.pairs ? 2 : 1); }
    int64_t outputs() const {
        int64_t all = 0;
        for (int i = 0; i < count; i++) all += products[i].weight.out;
        return all;
    }
    bool worth_it(int64_t height) const { return height * in() * outputs() >= SMALL; }
};

// Few rows: x [chains, R, LINE].
template <int R, class T>
void few(const Call& call, const float* x, const Pool& pool) {
    constexpr int SIDE = floor_power_of_2(std::min(ROWS * REGISTERS / R, 8)) / WIDE;  // panels there are registers for
    const int64_t steps = call.steps();
    struct Piece {
        const Product* product;
        int64_t first, last;  // panels
    };
    std::vector<Piece> pieces;
    int64_t panels = 0;
    for (int i = 0; i < call.count; i++) panels += panels_of(call.products[i].weight);
    const int64_t each = std::max<int64_t>(1, panels / (8 * pool.threads) / 4) * 4;
    for (int i = 0; i < (call.gated ? 1 : call.count); i++) {
        const int64_t own = panels_of(call.products[i].weight);
        for (int64_t p = 0; p < own; p += each) pieces.push_back({call.products + i, p, std::min(own, p + each)});
    }
    parallel(pool, int64_t(pieces.size()), call.worth_it(R), [&](int64_t item) {
        const Piece& piece = pieces[item];
        int64_t p = piece.first;
        const auto side_by_side = [&](auto panels) {
            constexpr int P = decltype(panels)::value;
            alignas(64) float sums[2][R * P * PANEL];
            auto sum = [&](const Panels& m, float* to) {
                for (int64_t k = 0; k < steps; k += CHAIN) {
                    const T* w = static_cast<const T*>(m.weight) + (p * steps + k) * PANEL;
                    const auto ahead = [=](int64_t i) {
                        for (int64_t j = 0; j < P; j++) fetch(w + (j * steps + i) * PANEL + AHEAD, STRIDE * PANEL * sizeof(T));
                    };
                    chain<R, P * WIDE>(x + k / CHAIN * R * LINE, w, steps * PANEL, std::min(CHAIN, steps - k), k == 0, to,
                                       P * PANEL, ahead);
                }
            };
            sum(piece.product->weight, sums[0]);
            if (call.gated) {
                sum(piece.product[1].weight, sums[1]);
                call.rows.finish_gated(piece.product, sums[0], sums[1], P * PANEL, 0, R, p * PANEL, P * PANEL);
            } else {
                call.rows.finish(*piece.product, sums[0], P * PANEL, 0, R, p * PANEL, P * PANEL);
            }
            p += P;
        };
        while (p + SIDE <= piece.last) side_by_side(std::integral_constant<int, SIDE>{});
        while (p < piece.last) side_by_side(std::integral_constant<int, 1>{});
    });
}

// Many rows: a block of them and a range of tiles at a time.
template <class T>
void many(const Call& call, const Pool& pool) {
    struct Tile {
        const Product* product;
        int64_t panel, steps;
        // Its weights from step k on, in its first panel.
        const T* weights(int64_t k) const {
            return static_cast<const T*>(product->weight.weight) + (panel * steps + k) * PANEL;
        }
    };
    const int64_t steps = call.steps();
    std::vector<Tile> tiles;
    for (int i = 0; i < (call.gated ? 1 : call.count); i++)
        for (int64_t panel = 0; panel < panels_of(call.products[i].weight); panel += TOGETHER) {
            tiles.push_back({call.products + i, panel, steps});
            if (call.gated) tiles.push_back({call.products + 1, panel, steps});
        }
    const Rows& rows = call.rows;
    const int64_t turn = call.gated ? 2 : 1, turns = int64_t(tiles.size()) / turn;
    const Parts blocks = Parts::of_at_most(rows.count, BLOCK);
    // Pieces are of one size, and their number a multiple of the threads'.
    const int64_t step = pool.threads / std::gcd(blocks.count, int64_t(pool.threads));
    const int64_t wanted = std::max((PIECES * pool.threads - 1) / blocks.count + 1, (turns * turn - 1) / WIDEST + 1);
    const Parts ranges{turns, std::min((wanted + step - 1) / step * step, (turns - 1) / NARROWEST + 1)};
    parallel(pool, blocks.count * ranges.count, call.worth_it(rows.count), [&](int64_t item) {
        const int64_t block = item % blocks.count, range = item / blocks.count;
        const int64_t height = blocks.size(block), first = blocks.first(block);
        const int64_t begin = ranges.first(range) * turn, end = ranges.first(range + 1) * turn;
        // The matrix unit takes whole tiles of rows; what lies in those beyond `height` meets nobody else's sums.
        constexpr int64_t UNIT = BY_TILES<T> ? TILE_ROWS : 1;
        constexpr int MOST = BY_TILES<T> ? 2 : ROWS;
        const Parts groups = Parts::of_at_most((height + UNIT - 1) / UNIT, MOST);
        const int64_t lines = groups.total * UNIT, size = lines * COLUMNS;
        const bool direct = INPUTS<T> == 2 || groups.count <= DIRECT;
        float* tile = scratch.reset(CHAIN * COLUMNS + lines * (LINE + (end - begin) * COLUMNS));
        float* inputs = tile + CHAIN * COLUMNS;
        float* sums = inputs + lines * LINE;  // [end − begin, lines, COLUMNS]
        if constexpr (BY_TILES<T>) Tiles::begin();
        for (int64_t k = 0; k < steps; k += CHAIN) {
            const int64_t n = std::min(CHAIN, steps - k);
            rows.take<T>(first, height, k, n, inputs);
            float* c = sums;
            for (int64_t at = begin; at < end; at++, c += size) {
                const T* w = tiles[at].weights(k);
                const T* next = at + 1 < end ? tiles[at + 1].weights(k) : tiles[begin].weights(k + n);
                // A panel that is not there is computed from another, and not kept.
                const int64_t apart =
                    tiles[at].panel + TOGETHER <= panels_of(tiles[at].product->weight) ? steps * PANEL : 0;
                if (!direct)
                    for (int t = 0; t < TOGETHER; t++)
                        for (int64_t i = 0; i < n * PANEL; i += W)
                            store(tile + t * n * PANEL + i, load_float(w + t * apart + i));
                for (int64_t g = 0; g < groups.count; g++) {
                    const float* x = inputs + groups.first(g) * UNIT * LINE;
                    float* to = c + groups.first(g) * UNIT * COLUMNS;
                    // Each group fetches its share of the next tile.
                    const T* share = next + g * n / groups.count * PANEL;
                    const int64_t each = STRIDE * PANEL / groups.count;
                    const auto ahead = [=](int64_t i) {
                        for (int t = 0; t < TOGETHER; t++)
                            fetch(share + t * steps * PANEL + i / STRIDE * each, each * int64_t(sizeof(T)));
                    };
                    with_constant<MOST>(groups.size(g), [&](auto height) {
                        constexpr int R = decltype(height)::value;
                        if constexpr (BY_TILES<T>) tile_chain<R>(x, w, apart, n, k == 0, to, ahead);
                        else if (direct) group_chain<R>(x, w, apart, n, k == 0, to, ahead);
                        else if constexpr (INPUTS<T> == 1) group_chain<R>(x, tile, n * PANEL, n, k == 0, to, ahead);
                    });
                }
            }
        }
        if constexpr (BY_TILES<T>) Tiles::end();
        for (int64_t at = begin; at < end; at += turn, sums += turn * size) {
            const Tile& own = tiles[at];
            if (call.gated)
                rows.finish_gated(own.product, sums, sums + size, COLUMNS, first, height, own.panel * PANEL, COLUMNS);
            else
                rows.finish(*own.product, sums, COLUMNS, first, height, own.panel * PANEL, COLUMNS);
        }
    });
}

void multiply(const Product* products, int number, bool gated, const void* x, int64_t count, int64_t stride, Float type,
              const Pool& pool) {
    if (count == 0) return;
    const Rows rows{x, count, stride, type};
    const Call call{products, number, gated, rows};
    const auto by = [&](auto weight) {
        using T = decltype(weight);
        if (count > ROWS) return many<T>(call, pool);
        const int64_t steps = call.steps();
        float* inputs = scratch.reset((steps + CHAIN - 1) / CHAIN * count * LINE);
        for (int64_t k = 0; k < steps; k += CHAIN)
            rows.take<T>(0, count, k, std::min(CHAIN, steps - k), inputs + k / CHAIN * count * LINE);
        with_constant<ROWS>(count, [&](auto rows) { few<decltype(rows)::value, T>(call, inputs, pool); });
    };
    if (products->weight.pairs && call.steps() % STRIDE == 0 && has_tiles())
        many<std::conditional_t<TILES, TilePair, Pair>>(call, pool);
    else if (PAIRS && products->weight.pairs) by(Pair{});
    else with_float(products->weight.type, by);
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
const PanelKernels panels = {PAIRS, has_tiles, multiply, pack, spin};

}  // namespace octavo::weights::ISA
