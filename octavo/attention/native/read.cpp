// What lies in the cache, read back.
#include <atomic>

#include "parallel.h"
#include "rows.h"

namespace octavo::ISA {
namespace {

// The centered codes of one token: row[dim].
void unpack(const Side& side, const uint8_t* block, int token, float* row) {
    auto raw = [&](auto type) {
        const auto* values = reinterpret_cast<const decltype(type)*>(block);
        for (int d = 0; d < side.dim; d++)
            row[d] = to_float(values[side.is_k ? int64_t(d) * BLOCK + token : int64_t(token) * side.dim + d]);
    };
    if (side.code == Code::BF16) return raw(bf16{});
    if (side.code == Code::FP16) return raw(fp16{});
    if (side.code == Code::FP32) return raw(float{});
    if (side.code == Code::FP8) return raw(fp8{});
    const int width = side.code == Code::INT4 ? side.dim / 2 : side.dim;
    const uint8_t* first = side.is_k ? block + token * 4 : block + int64_t(token / 4) * width * 4 + token % 4;
    for (int d = 0; d < width; d++) {
        const uint8_t byte = side.is_k ? first[int64_t(d / 4) * BLOCK * 4 + d % 4] : first[int64_t(d) * 4];
        if (side.code == Code::INT4) {
            row[d] = float(byte & 15) - 7.5f;
            row[d + width] = float(byte >> 4) - 7.5f;
        } else {
            row[d] = float(int8_t(side.is_k ? byte ^ 128 : byte));
        }
    }
}

}  // namespace

void read(const Side& side, int head, int heads, const int64_t* blocks, int64_t count, Float type, void* out,
          const Pool& pool) {
    const int64_t items = heads * count;
    parallel(pool, items, items * BLOCK * side.dim >= 1 << 15, [&](int64_t item) {
        alignas(64) float row[LARGEST + W] = {};
        const int64_t cell = blocks[item % count] * side.heads + head + item / count;
        for (int t = 0; t < BLOCK; t++) {
            unpack(side, side.codes + cell * side.head_bytes, t, row);
            if (side.scales) {
                const float scale = side.token_scale[side.scales[cell * BLOCK + t]];
                for (int d = 0; d < side.dim; d++) row[d] *= scale;
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
