"""The kernel that reads the cache: a tile of queries over the blocks of one KV head, with a running softmax.

A tile is M rows: consecutive new tokens of one sequence times the query heads that share the KV head. A decode is a
tile of one token whose blocks are divided among several programs (flash-decoding); a chunk is many tiles that each read
all they see. What a program has summed goes to `combine`.

Scores are in units of log2, weights w_t = s_t·2^(score_t − M + 15) with M the running maximum of score_t + log2 s_t:
float16 then holds what is 20 nats below the maximum as exactly as the maximum, and the token scale of V is part of the
weight. The sum of weights, which must not have s_t in it, is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.attention.cuda.codes import (
    dot,
    dot_bytes,
    high_nibbles,
    high_numbers,
    log2_scale,
    low_nibbles,
    low_numbers,
    numbers,
)

LIFT = tl.constexpr(15.0)  # the largest weight is 2¹⁵
NOTHING = tl.constexpr(-1e30)  # the maximum of a row that has seen nothing: finite, so that differences are not NaN


# What differs from step to step must not compile anew: into how many parts the context is cut, how wide the block table
# is and where in a packed copy it lies.
@triton.jit(do_not_specialize=["table_stride", "splits"], do_not_specialize_on_alignment=["table"])
def scan(
    folded, factor, shift, k_codes, k_scales, v_codes, v_scales,
    tiles, q_start, kv_len, table, table_stride, sums, tops, totals, window, softcap, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    K_DIM: tl.constexpr, K_PADDED: tl.constexpr, K_BITS: tl.constexpr, K_TOKEN: tl.constexpr,
    V_DIM: tl.constexpr, V_PADDED: tl.constexpr, V_BITS: tl.constexpr, V_TOKEN: tl.constexpr,
    SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    M: tl.constexpr, QUERIES: tl.constexpr, SHORTEST: tl.constexpr,
    PRECISION: tl.constexpr, V_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Program (tile, head, split). A tile has QUERIES new tokens, the last of a chunk fewer; results lie by tile."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    row = tl.load(q_start + sequence)
    new = tl.load(q_start + sequence + 1) - row
    context = tl.load(kv_len + sequence)

    member = tl.arange(0, M)
    query = first + member // GROUP
    live = (member < QUERIES * GROUP) & (query < new)
    position = context - new + query
    line = ((row + query) * KV_HEADS + head).to(tl.int64) * GROUP + member % GROUP  # of [T·heads] rows

    # This split's share of the blocks that the tile sees.
    end = tl.cdiv(tl.minimum(context - new + first + QUERIES, context), BLOCK)
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - new + first + 1 - window, 0) // BLOCK
    each = tl.maximum(tl.cdiv(end - begin, splits), SHORTEST)
    begin += split * each
    end = tl.minimum(begin + each, end)

    k_width: tl.constexpr = (K_DIM + 1) // 2 if K_BITS == 4 else K_DIM
    v_width: tl.constexpr = (V_DIM + 1) // 2 if V_BITS == 4 else V_DIM
    kd, vd, token = tl.arange(0, K_PADDED), tl.arange(0, V_PADDED), tl.arange(0, BLOCK)

    unit = tl.load(factor + line, live, 0.0)
    if K_BITS == 8 or K_BITS == 4:
        place = folded + (line * 2 * K_DIM)[:, None] + kd[None, :]
        inside = live[:, None] & (kd < k_width)[None, :]
        q_high = tl.load(place, inside, 0)
        q_low = tl.load(place + K_DIM, inside, 0)
        if K_BITS == 4:  # the second half of the dimensions meets the high nibbles
            inside = live[:, None] & (kd + k_width < K_DIM)[None, :]
            p_high = tl.load(place + k_width, inside, 0)
            p_low = tl.load(place + k_width + K_DIM, inside, 0)
            middle = 7.5 * (
                128 * tl.sum(q_high.to(tl.int32) + p_high.to(tl.int32), 1)
                + tl.sum(q_low.to(tl.int32) + p_low.to(tl.int32), 1)
            ).to(tl.float32)
    else:
        q = tl.load(folded + (line * K_DIM)[:, None] + kd[None, :], live[:, None] & (kd < K_DIM)[None, :], 0.0)
    if SHIFT:
        base = tl.load(shift + line, live, 0.0)

    top = tl.full([M], NOTHING, tl.float32)
    total = tl.zeros([M], tl.float32)
    sum_ = tl.zeros([M, V_PADDED], tl.float32)
    if V_BITS == 4:
        sum_high = tl.zeros([M, V_PADDED], tl.float32)

    # A chunk without a window first reads the blocks that every row sees whole, and masks nothing there.
    whole = begin
    if QUERIES > 1 and not WINDOW:
        whole = tl.minimum(tl.maximum((context - new + first + 1) // BLOCK, begin), end)
    for masked in tl.static_range(0 if QUERIES > 1 and not WINDOW else 1, 2):
        for b in range(whole if masked else begin, end if masked else whole):
            line_of_block = (tl.load(table + sequence * table_stride + b) * KV_HEADS + head) * BLOCK
            codes = tl.load(
                k_codes + line_of_block * k_width + kd[:, None] + token[None, :] * k_width, (kd < k_width)[:, None], 0
            )
            if K_BITS == 8:
                score = (128 * dot_bytes(q_high, codes) + dot_bytes(q_low, codes)).to(tl.float32)
            elif K_BITS == 4:
                low, high = low_nibbles(codes), high_nibbles(codes)
                product = 128 * (dot_bytes(q_high, low) + dot_bytes(p_high, high))
                product += dot_bytes(q_low, low) + dot_bytes(p_low, high)
                score = product.to(tl.float32) - middle[:, None]
            else:
                score = dot(q, codes.to(q.dtype), tl.zeros([M, BLOCK], tl.float32), PRECISION)
            score *= unit[:, None]
            if K_TOKEN:
                score *= tl.exp2(log2_scale(tl.load(k_scales + line_of_block + token), K_BITS))[None, :]
            if SHIFT:
                score += base[:, None]
            if SOFTCAP:
                score = softcap * (1 - 2 / (tl.exp2(score) + 1))  # softcap·tanh: `unit` holds the rest
            key = b * BLOCK + token
            if V_TOKEN:
                scale = log2_scale(tl.load(v_scales + line_of_block + token), V_BITS)
                score += scale[None, :]
            if masked:
                seen = key[None, :] <= position[:, None]
                if WINDOW:
                    seen &= key[None, :] > position[:, None] - window
                score = tl.where(seen, score, float("-inf"))

            higher = tl.maximum(top, tl.max(score, 1))
            keep = tl.exp2(top - higher)
            weight = tl.exp2(score - (higher - LIFT)[:, None])
            top = higher
            if V_TOKEN:
                total = total * keep + tl.sum(weight * tl.exp2(-scale)[None, :], 1)
            else:
                total = total * keep + tl.sum(weight, 1)

            if V_BITS == 8 or V_BITS == 4:
                codes = tl.load(
                    v_codes + line_of_block * v_width + token[:, None] + vd[None, :] * BLOCK, (vd < v_width)[None, :], 0
                )
                weight = weight.to(tl.float16)
                if V_BITS == 8:
                    sum_ = dot(weight, numbers(codes), sum_ * keep[:, None], PRECISION)
                else:
                    sum_ = dot(weight, low_numbers(codes), sum_ * keep[:, None], PRECISION)
                    sum_high = dot(weight, high_numbers(codes), sum_high * keep[:, None], PRECISION)
            else:
                present = (vd < v_width)[None, :]
                if masked:  # beyond the context lies what was there before: NaN, perhaps, and 0·NaN is NaN
                    present = present & (key < context)[:, None]
                codes = tl.load(
                    v_codes + line_of_block * v_width + token[:, None] * v_width + vd[None, :], present, 0.0
                )
                if V_FLOAT32:
                    codes = codes.to(tl.float32)
                sum_ = dot(weight.to(codes.dtype), codes, sum_ * keep[:, None], PRECISION)

    line = ((tile * QUERIES + member // GROUP) * KV_HEADS + head).to(tl.int64) * GROUP + member % GROUP
    line = line * splits + split
    tl.store(tops + line, top, live)
    tl.store(totals + line, total, live)
    if begin < end:  # `combine` looks at no sums of a split that had nothing to read
        target = sums + (line * V_DIM)[:, None] + vd[None, :]
        tl.store(target, sum_, live[:, None] & (vd < v_width)[None, :])
        if V_BITS == 4:
            tl.store(target + v_width, sum_high, live[:, None] & (vd + v_width < V_DIM)[None, :])
