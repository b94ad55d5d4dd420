"""The kernel that reads the cache: a tile of queries over the blocks of one KV head, with a running softmax.

A tile is M rows: consecutive new tokens of one sequence times the query heads that share the KV head. A decode is a
tile of one token whose blocks are divided among several programs (flash-decoding); a chunk is many tiles that each read
all they see. Where the format has edges, one program more reads the raw pages of page 0 and of the own spans, and the
others the codes between. What a program has summed goes to `combine`.

Scores are in units of log2, weights w_t = s_t·2^(score_t − M + 15) with M the running maximum of score_t + log2 s_t:
float16 then holds what is 20 nats below the maximum as exactly as the maximum, and the token scale of V is part of the
weight. The sum of weights, which must not have s_t in it, is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.attention.cuda.codes import (
    FP8,
    dot,
    dot_bytes,
    fp8_numbers,
    high_nibbles,
    high_numbers,
    log2_scale,
    low_nibbles,
    low_numbers,
    numbers,
)

LIFT = tl.constexpr(15.0)  # the largest weight is 2¹⁵
NOTHING = tl.constexpr(-1e30)  # the maximum of a row that has seen nothing: finite, so that differences are not NaN


@triton.jit
def read(
    query, at, unit, base, live, position, until, own, context, head,
    k_codes, k_scales, v_codes, v_scales, pages, page_0, begin, low, whole, end,
    sums, tops, totals, window, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    K_DIM: tl.constexpr, K_PADDED: tl.constexpr, K_BITS: tl.constexpr, K_TOKEN: tl.constexpr,
    V_DIM: tl.constexpr, V_PADDED: tl.constexpr, V_BITS: tl.constexpr, V_TOKEN: tl.constexpr,
    SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, RAW: tl.constexpr,
    M: tl.constexpr, QUERIES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, V_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Sum what M queries see of the blocks begin … end of one KV head, and store it as this program's part.

    Queries lie `at` [M] elements from `query`; `unit` [M] makes scores of products; if SHIFT, `base` [M] is added to
    them. A query sees the keys before `until` [M] that its window reaches. Block b is the one that the
    table `pages` names; if RAW it is page `pages` + b, block low − 1 stands for page 0, which is page `page_0`, and of
    the others only keys from `own` [M] on are seen. Up to `whole` every query sees all of a block: FIRST is 0 if there
    can be such blocks, LAST 1 if there are no others, else they are 1 and 2.
    """
    k_width: tl.constexpr = (K_DIM + 1) // 2 if K_BITS == 4 else K_DIM
    v_width: tl.constexpr = (V_DIM + 1) // 2 if V_BITS == 4 else V_DIM
    kd, vd, token = tl.arange(0, K_PADDED), tl.arange(0, V_PADDED), tl.arange(0, BLOCK)

    place = query + at[:, None] + kd[None, :]
    if K_BITS == 8 or K_BITS == 4:
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
        q = tl.load(place, live[:, None] & (kd < K_DIM)[None, :], 0.0)

    top = tl.full([M], NOTHING, tl.float32)
    total = tl.zeros([M], tl.float32)
    sum_ = tl.zeros([M, V_PADDED], tl.float32)
    if V_BITS == 4:
        sum_high = tl.zeros([M, V_PADDED], tl.float32)

    for masked in tl.static_range(FIRST, LAST):
        for b in tl.range(whole if masked else begin, end if masked else whole, num_stages=STAGES):
            if RAW:
                number = tl.where(b < low, 0, b)
                block = tl.where(b < low, page_0, pages + b)
            else:
                number = b
                block = tl.load(pages + b)
            line_of_block = (block * KV_HEADS + head) * BLOCK
            codes = tl.load(
                k_codes + line_of_block * k_width + kd[:, None] + token[None, :] * k_width, (kd < k_width)[:, None], 0
            )
            if K_BITS == 8:
                score = (128 * dot_bytes(q_high, codes) + dot_bytes(q_low, codes)).to(tl.float32)
            elif K_BITS == 4:
                low_, high = low_nibbles(codes), high_nibbles(codes)
                product = 128 * (dot_bytes(q_high, low_) + dot_bytes(p_high, high))
                product += dot_bytes(q_low, low_) + dot_bytes(p_low, high)
                score = product.to(tl.float32) - middle[:, None]
            else:
                if K_BITS == FP8:
                    codes = fp8_numbers(codes)
                score = dot(q, codes.to(q.dtype), tl.zeros([M, BLOCK], tl.float32), PRECISION)
            score *= unit[:, None]
            if K_TOKEN:
                score *= tl.exp2(log2_scale(tl.load(k_scales + line_of_block + token), K_BITS))[None, :]
            if SHIFT:
                score += base[:, None]
            if SOFTCAP:
                score = softcap * (1 - 2 / (tl.exp2(score) + 1))  # softcap·tanh: `unit` holds the rest
            key = number * BLOCK + token
            if V_TOKEN:
                scale = log2_scale(tl.load(v_scales + line_of_block + token), V_BITS)
                score += scale[None, :]
            if masked:
                seen = key[None, :] < until[:, None]
                if RAW:
                    seen &= (b < low) | (key[None, :] >= own[:, None])
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

            if V_BITS == 8 or V_BITS == 4 or V_BITS == FP8:
                codes = tl.load(
                    v_codes + line_of_block * v_width + token[:, None] + vd[None, :] * BLOCK, (vd < v_width)[None, :], 0
                )
                weight = weight.to(tl.float16)
                if V_BITS == FP8:
                    sum_ = dot(weight, fp8_numbers(codes), sum_ * keep[:, None], PRECISION)
                elif V_BITS == 8:
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

    member = tl.arange(0, M)  # anew: across the loop these would take registers
    part = ((tl.program_id(0) * QUERIES + member // GROUP) * KV_HEADS + head).to(tl.int64) * GROUP + member % GROUP
    part = part * tl.num_programs(2) + tl.program_id(2)
    tl.store(tops + part, top, live)
    tl.store(totals + part, total, live)
    if begin < end:  # `combine` looks at no sums of a part that had nothing to read
        target = sums + (part * V_DIM)[:, None] + vd[None, :]
        tl.store(target, sum_, live[:, None] & (vd < v_width)[None, :])
        if V_BITS == 4:
            tl.store(target + v_width, sum_high, live[:, None] & (vd + v_width < V_DIM)[None, :])


# What differs from step to step must not compile anew: into how many parts the context is cut, how wide the block table
# is, and where in a packed copy it and the numbers of raw pages lie.
@triton.jit(
    do_not_specialize=["table_stride", "splits"], do_not_specialize_on_alignment=["table", "first_page", "own_page"]
)
def scan(
    folded, factor, shift, k_codes, k_scales, v_codes, v_scales,
    q, q_token, q_head, unit, k_raw, v_raw, first_page, own_page,
    tiles, q_start, kv_len, table, table_stride, sums, tops, totals, window, softcap, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    K_DIM: tl.constexpr, K_PADDED: tl.constexpr, K_BITS: tl.constexpr, K_TOKEN: tl.constexpr,
    V_DIM: tl.constexpr, V_PADDED: tl.constexpr, V_BITS: tl.constexpr, V_TOKEN: tl.constexpr,
    SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr,
    K_RAW_PADDED: tl.constexpr, V_RAW_PADDED: tl.constexpr,
    M: tl.constexpr, QUERIES: tl.constexpr, SHORTEST: tl.constexpr,
    PRECISION: tl.constexpr, V_FLOAT32: tl.constexpr, RAW_FLOAT32: tl.constexpr, RAW_STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile, head, part). A tile has QUERIES new tokens, the last of a chunk fewer; results lie by tile.

    Parts are `splits` of the stored blocks and, with edges (SPAN rows an own span, else 0), the raw pages: page 0 of
    sequence i is `first_page[i]`, and from `own_page[i]` on lie those of the own span of its first new token, and more.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    row = tl.load(q_start + sequence)
    context = tl.load(kv_len + sequence)
    past = context - (tl.load(q_start + sequence + 1) - row)

    member = tl.arange(0, M)
    position = past + first + member // GROUP
    live = (member < QUERIES * GROUP) & (position < context)
    token = (row + first + member // GROUP).to(tl.int64)
    line = (token * KV_HEADS + head) * GROUP + member % GROUP  # of [T·heads] rows

    # The tile's queries are at oldest … newest, and see no key before `reach`.
    oldest = past + first
    newest = tl.minimum(oldest + QUERIES, context) - 1
    reach = 0
    if WINDOW:
        reach = tl.maximum(oldest + 1 - window, 0)
    if SPAN == 0:
        own = position
        until = position + 1
        begin = reach // BLOCK
        whole = (oldest + 1) // BLOCK
        end = tl.cdiv(newest + 1, BLOCK)
        coded: tl.constexpr = True
    else:
        own = tl.maximum(position, 0) // SPAN * SPAN
        until = own
        begin = tl.maximum(reach // BLOCK, 1)
        whole = oldest // SPAN * (SPAN // BLOCK)
        end = tl.maximum(newest, 0) // SPAN * (SPAN // BLOCK)
        coded = split < splits

    if coded:
        each = tl.maximum(tl.cdiv(end - begin, splits), SHORTEST)
        begin += split * each
        end = tl.minimum(begin + each, end)
        # Blocks that every row sees whole, where nothing is masked, come first; of a decode without edges all but one
        # are, which is not worth a loop more.
        some_whole: tl.constexpr = not WINDOW and (QUERIES > 1 or SPAN > 0)
        all_whole: tl.constexpr = not WINDOW and QUERIES == 1 and SPAN > 0
        whole = tl.minimum(tl.maximum(whole, begin), end) if some_whole else begin
        base = tl.load(shift + line, live, 0.0) if SHIFT else 0.0
        width: tl.constexpr = 2 * K_DIM if K_BITS == 8 or K_BITS == 4 else K_DIM
        read(folded, line * width, tl.load(factor + line, live, 0.0), base, live, position, until, own, context, head,
             k_codes, k_scales, v_codes, v_scales, table + sequence * table_stride, 0, begin, 0, whole, end,
             sums, tops, totals, window, softcap, KV_HEADS, GROUP, BLOCK, K_DIM, K_PADDED, K_BITS, K_TOKEN,
             V_DIM, V_PADDED, V_BITS, V_TOKEN, SHIFT, SOFTCAP, WINDOW, False, M, QUERIES,
             0 if some_whole else 1, 1 if all_whole else 2, None, PRECISION, V_FLOAT32)  # fmt: skip
    else:
        low = tl.maximum(tl.maximum(oldest // SPAN * SPAN, reach) // BLOCK, 1)
        begin = tl.where(reach < BLOCK, low - 1, low)
        pages = tl.load(own_page + sequence) - tl.maximum(past, 0) // SPAN * (SPAN // BLOCK)
        at = token * q_token + (head * GROUP + member % GROUP) * q_head
        end = tl.cdiv(newest + 1, BLOCK)
        read(q, at, tl.full([M], unit, tl.float32), 0.0, live, position, position + 1, own, context, head,
             k_raw, None, v_raw, None, pages, tl.load(first_page + sequence), begin, low, begin, end,
             sums, tops, totals, window, softcap, KV_HEADS, GROUP, BLOCK, K_DIM, K_RAW_PADDED, 16, False,
             V_DIM, V_RAW_PADDED, 16, False, False, SOFTCAP, WINDOW, True, M, QUERIES,
             1, 2, RAW_STAGES, PRECISION, RAW_FLOAT32)  # fmt: skip
