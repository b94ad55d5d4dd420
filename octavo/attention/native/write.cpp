// Rows become codes and go to their places of a block.
#include "write.h"

#include <algorithm>

#include "parallel.h"
#include "rows.h"

namespace octavo::ISA {
namespace {

f32v number(f32v x) { return x == x ? x : splat(0.0f); }

// Codes of y[dim] times `factor`, NaN as 0; returns how many values do not lie within `limit`.
int encode_int8(const float* y, int dim, float factor, float limit, uint8_t* code) {
    i32v beyond = {};
    for (int d = 0; d < dim; d += W) {
        const f32v x = load<f32v>(y + d) * factor;
        beyond -= ~(abs(x) <= limit);  // of a NaN too
        store_bytes(code + d, nearest(min(max(number(x), splat(-128.0f)), splat(127.0f))));
    }
    return int(sum(to_float(beyond)));
}

int encode_int4(const float* y, int dim, float factor, float limit, uint8_t* code) {
    i32v beyond = {};
    for (int d = 0; d < dim; d += W) {
        const f32v x = load<f32v>(y + d) * factor, bounded = min(max(number(x), splat(-8.0f)), splat(7.0f));
        beyond -= ~(abs(x) <= limit);
        i32v floor = __builtin_convertvector(bounded, i32v);
        floor += to_float(floor) > bounded;
        store_bytes(code + d, floor + 8);
    }
    return int(sum(to_float(beyond)));
}

// Codes of one row, y[dim] and zeros to a whole number of registers; returns how many values were out of range.
int encode(const Side& side, float* y, uint8_t* code, uint8_t* scale_index) {
    const int dim = side.dim;
    if (side.rotated) rotate(y, dim);
    if (!side.scales) return encode_int8(y, dim, 1.0f, 128.5f, code);
    f32v largest = {};
    for (int d = 0; d < dim; d += W) largest = max(abs(load<f32v>(y + d)), largest);  // of numbers
    *scale_index = uint8_t(std::lower_bound(side.token_limit, side.token_limit + 255, max(largest)) - side.token_limit);
    const float reciprocal = side.token_reciprocal[*scale_index];
    if (side.code == Code::INT8) return encode_int8(y, dim, reciprocal, 127.5f, code);
    return encode_int4(y, dim, reciprocal, 8.5f, code);
}

// Put the codes of one row into its place of a block.
void place(const Side& side, uint8_t* block, int token, uint8_t* code) {
    int width = side.dim;
    if (side.code == Code::INT4) {
        width /= 2;
        for (int d = 0; d < width; d++) code[d] |= code[d + width] << 4;
    } else if (side.is_k) {
        for (int d = 0; d < width; d++) code[d] ^= 128;
    }
    if (side.is_k)
        for (int d = 0; d < width; d += 4) std::memcpy(block + (int64_t(d) * BLOCK / 4 + token) * 4, code + d, 4);
    else
        for (int d = 0; d < width; d++) block[(int64_t(token / 4) * width + d) * 4 + token % 4] = code[d];
}

// The same of numbers.
template <class T>
void place(const Side& side, uint8_t* block, int token, const float* y) {
    T row[LARGEST], *to = reinterpret_cast<T*>(block) + (side.is_k ? token : token * side.dim);
    for (int d = 0; d < side.dim; d++) from_float(y[d], row[d]);
    if (!side.is_k) std::copy_n(row, side.dim, to);
    else
        for (int d = 0; d < side.dim; d++) to[d * BLOCK] = row[d];
}

void count(const Side& side, int out_of_range) {
    if (out_of_range) __atomic_fetch_add(side.saturated, out_of_range, __ATOMIC_RELAXED);
}

}  // namespace

void put_row(const Side& side, int head, int64_t slot, float* row) {
    if (slot < 0) return;
    const int64_t at = slot / BLOCK * side.heads + head;
    uint8_t* block = side.codes + at * side.head_bytes;
    const int token = int(slot % BLOCK);
    if (side.mu)
        for (int d = 0; d < side.dim; d++)
            row[d] = (row[d] - side.mu[head * side.dim + d]) * side.reciprocal[head * side.dim + d];
    if (side.code == Code::FP8) {
        int out_of_range = 0;
        for (int d = 0; d < side.dim; d++) {
            out_of_range += !(std::fabs(row[d]) <= 464.0f);  // half a step beyond the largest, or NaN
            if (std::isnan(row[d])) row[d] = 0;
        }
        count(side, out_of_range);
    }
    if (!is_integer(side.code))
        return with_number(side.code, [&](auto kind) { place<decltype(kind)>(side, block, token, row); });
    alignas(64) uint8_t code[LARGEST];
    uint8_t index = 0;
    count(side, encode(side, row, code, &index));
    place(side, block, token, code);
    if (side.scales) side.scales[at * BLOCK + token] = index;
}

void expect_row(const Side& side, int head, int64_t slot) {
    if (slot < 0) return;
    const uint8_t* block = side.codes + (slot / BLOCK * side.heads + head) * side.head_bytes;
    if (side.is_k) {
        for (int64_t at = slot % BLOCK * cell(side); at < side.head_bytes; at += BLOCK * cell(side))
            __builtin_prefetch(block + at, 1);
    } else {
        const int64_t rows = is_integer(side.code) ? 4 : 1, bytes = side.head_bytes / BLOCK * rows;  // that lie together
        block += slot % BLOCK / rows * bytes;
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(block + at, 1);
    }
}

void write(const Side& side, const Rows& x, const int64_t* slots, int64_t tokens, const Pool& pool) {
    over_rows(tokens, side.heads, side.dim, pool, [&](int64_t t, int head) {
        if (slots[t] < 0) return;
        alignas(64) float row[LARGEST];
        widen(x, t, head, side.dim, row);
        put_row(side, head, slots[t], row);
    });
}

}  // namespace octavo::ISA
