// What Python hands to the kernels: plain structs of pointers and sizes, the same for every instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "types.h"

namespace octavo {

constexpr int BLOCK = 64;  // tokens of a block
constexpr int LARGEST = 512;  // dim of a row: up to there, 15-bit queries times codes fit int32

enum class Code : int { BF16, FP16, FP32, INT8, INT4, FP8 };
inline bool is_integer(Code code) { return code == Code::INT8 || code == Code::INT4; }

// One side, K or V, of one layer's cache. A head's rows of a block are `head_bytes` apart, blocks `heads·head_bytes`:
//
//     K   raw [dim][64]      INT8 u8 = code + 128 [dim/4][64][4]      INT4 two a byte [dim/8][64][4]
//     V   raw [64][dim]      INT8 [64/4][dim][4]                      INT4 [64/4][dim/2][4]
//
// FP8 (e4m3) lies as raw numbers do, a byte each. INT4 holds value d in the low half of byte d and value d + dim/2 in the high half.
struct Side {
    Code code;
    int heads, dim;
    bool is_k, rotated;
    uint8_t* codes;
    uint8_t* scales;  // [blocks, heads, 64] or null: no token scale
    const float *mu, *c, *reciprocal;  // [heads, dim] or null: no static part
    const float *token_scale, *token_reciprocal, *token_limit;  // [256], of the specification
    int64_t head_bytes;
    int64_t* saturated;
    int64_t blocks = 0;  // that there are, for whoever checks
};

// Bytes of a token's numbers of K that lie together.
inline int64_t cell(const Side& k) { return is_integer(k.code) ? 4 : k.head_bytes / BLOCK / k.dim; }

struct Attention {
    int heads;  // of queries
    float scale;
    int64_t window;  // 0: none
    float softcap;   // 0: none
    const float* sinks;  // [heads] or null
};

// The sequences of a step: each has some new tokens, its newest.
struct Step {
    int sequences;
    const int64_t* q_start;  // [sequences + 1] the first of its rows in q and out; last, the rows of all
    const int64_t* kv_len;  // [sequences] tokens that the newest sees, itself included; 0: none, and its answer is 0
    const int64_t* table;  // [sequences, table_width]
    int64_t table_width;
};

struct Rows {  // x[token, head, ·]: strides in elements, the last dimension is contiguous
    const void* data;
    Float type;
    int64_t token_stride, head_stride;
};

// A step's own rows, which are written before they are read. A slot is page·64 + place, below 0: nowhere.
struct NewRows {
    Rows k, v;
    const int64_t* slots;  // [rows] of their codes; null: another layer has written them
};

// Formats with edges: a query at position t reads raw the rows of page 0 and those of its own span, from ⌊t/span⌋·span on.
struct Edges {
    int span;  // rows, whole pages
    Side k, v;  // raw pages of the cache
    const int64_t* first;  // [sequences] the page, of those, that holds page 0
    const int64_t* ring;  // [sequences] the first of span/64 pages in a row: a later row t lies at t mod span
    const int64_t* slots;  // [rows] of new rows, written as those of codes are
    Side hand_k, hand_v;  // raw pages of this step
    const int64_t* hand;  // [sequences] the first of those that hold its rows from the own span of its oldest new token
                          // on, page by page; −1: its own span is in the ring
    const int64_t* hand_slots;  // [rows] of new rows
};

struct Kernels {
    const char* name;
    void (*write)(const Side&, const Rows& x, const int64_t* slots, int64_t tokens, const Pool&);
    // Attention of all new tokens, whose rows it first writes: in float32, a row's bits the same in any company. With
    // `bytes` sequences with one new token multiply integer codes as bytes, queries and weights rounded to 15 and 16 bits.
    void (*attend)(const Side& k, const Side& v, const Edges* edges, const Attention&, const Step&, const NewRows&,
                   const Rows& q, void* out, bool bytes, const Pool&);
    // Nothing but reading the codes of the blocks, all heads: what the memory allows. Returns their sum.
    int64_t (*stream)(const Side&, const int64_t* blocks, int64_t count, const Pool&);
};

}  // namespace octavo
