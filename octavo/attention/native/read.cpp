// What lies in the cache, read back.
#include <atomic>

#include "parallel.h"
#include "product.h"
#include "rows.h"
#include "scratch.h"

namespace octavo::ISA {

void read(const Side& side, int head, int heads, const int64_t* blocks, int64_t count, Float type, void* out,
          const Pool& pool) {
    const int depth = side.is_k ? side.dim : BLOCK;
    const int64_t items = heads * count;
    parallel(pool, items, items * BLOCK * side.dim >= 1 << 15, [&](int64_t item) {
        thread_local Scratch scratch;
        float* tile = scratch.reset(BLOCK * padded(side.dim));
        alignas(64) float row[LARGEST + W] = {};
        const int64_t cell = blocks[item % count] * side.heads + head + item / count;
        widen_page(side, side.codes + cell * side.head_bytes, {0, depth}, tile);
        for (int t = 0; t < BLOCK; t++) {
            float scale = unit(side.code);
            if (side.scales) scale *= side.token_scale[side.scales[cell * BLOCK + t]];
            for (int d = 0; d < side.dim; d++) {
                const int k = side.is_k ? d : t, column = side.is_k ? t : d;
                row[d] = tile[(int64_t(column / PANEL) * depth + k) * PANEL + column % PANEL] * scale;
            }
            if (side.rotated) rotate(row, side.dim);
            with_float(type, [&](auto kind) {
                auto* to = static_cast<decltype(kind)*>(out) + (item * BLOCK + t) * side.dim;
                for (int d = 0; d < side.dim; d++) from_float(row[d], to[d]);
            });
        }
    });
}

int64_t stream(const Side& side, const int64_t* blocks, int64_t count, const Pool& pool) {
    std::atomic<int64_t> total{0};
    parallel(pool, count, true, [&](int64_t b) {
        const uint8_t* block = side.codes + blocks[b] * side.heads * side.head_bytes;
        i32v sum[4] = {};
        for (int64_t at = 0; at + 16 * W <= side.heads * side.head_bytes; at += 16 * W)
            for (int i = 0; i < 4; i++) sum[i] += load<i32v>(block + at + i * 4 * W);
        total.fetch_add((sum[0] + sum[1] + sum[2] + sum[3])[0], std::memory_order_relaxed);
    });
    return total;
}

}  // namespace octavo::ISA
