// Nothing but reading codes: what the memory allows.
#include <atomic>

#include "kernel.h"
#include "parallel.h"
#include "simd.h"

namespace octavo::ISA {

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
