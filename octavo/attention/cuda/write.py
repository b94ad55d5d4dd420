"""One launch a layer before attention: new K and V rows become codes in their slots, queries are folded.

What must be bit for bit as in quant/codec.py is written in its order of operations; nothing here may become a fused
multiply-add (a sum of two products would).
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.attention.cuda.codes import ROUND, fp8_bits, rotate

QUERY_STEPS = tl.constexpr(127 * 128)  # a query against integer codes is two int8, 128·high + low


@triton.jit
def put(
    value, slots, live, head, memory,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Put elements value [TOKENS, ·], of which WIDTH count, of one head into their slots; rows that are not `live` go
    nowhere."""
    d = tl.arange(0, value.shape[1])
    line, place = (slots // BLOCK * HEADS + head) * BLOCK, slots % BLOCK  # of [num_blocks·HEADS·BLOCK] rows
    value = value.to(memory.dtype.element_ty)
    inside = live[:, None] & (d < WIDTH)[None, :]
    if BY_COLUMN:
        # Lanes along the tokens, which lie side by side.
        at = memory + (line * WIDTH + place)[None, :] + (d * BLOCK)[:, None]
        tl.store(at, tl.trans(value), tl.trans(inside))
    else:
        tl.store(memory + ((line + place) * WIDTH)[:, None] + d[None, :], value, inside)


@triton.jit
def encode(
    x, slots, live, head, codes, scales, mu, reciprocal, limits, token_reciprocal, saturated,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, ROTATED: tl.constexpr, STATIC: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Put rows x [TOKENS, PADDED] of one head into their slots as codes; rows that are not `live` go nowhere."""
    d = tl.arange(0, PADDED)
    width: tl.constexpr = (DIM + 1) // 2 if BITS == 4 else DIM
    if KIND == "raw":
        value = x
    else:
        y = x.to(tl.float32)
        inside = live[:, None] & (d < DIM)[None, :]
        if STATIC:
            y = (y - tl.load(mu + head * DIM + d, d < DIM, 0.0)) * tl.load(reciprocal + head * DIM + d, d < DIM, 0.0)
        y = tl.where(inside, y, 0.0)
        if ROTATED:
            y = rotate(y, TOKENS, PADDED, DIM)
        wrong = y != y
        y = tl.where(wrong, 0.0, y)
        # |y| of the largest value that counts as inside: half a step beyond the largest code.
        levels: tl.constexpr = 128.0 if KIND == "static" else (8.0 if BITS == 4 else 127.0)
        largest: tl.constexpr = 464.0 if KIND == "float" else levels + 0.5
        if KIND == "token":
            limit = tl.load(limits + tl.arange(0, 256))
            above = limit[None, :] < tl.max(tl.abs(y), 1)[:, None]
            e = tl.minimum(tl.sum(above.to(tl.int32), 1), 255)
            y = y * tl.load(token_reciprocal + e)[:, None]
            tl.store(scales + (slots // BLOCK * HEADS + head) * BLOCK + slots % BLOCK, e.to(tl.uint8), live)
        outside = tl.sum(tl.sum((wrong | (tl.abs(y) > largest)).to(tl.int32), 1), 0)
        tl.atomic_add(saturated, outside.to(tl.int64), outside > 0)
        if KIND == "float":
            value = fp8_bits(y)
        elif BITS == 4:
            nibble = tl.clamp(tl.floor(y) + 8, 0.0, 15.0).to(tl.int32)
            w = tl.arange(0, PADDED // 2)[None, :] + tl.zeros([TOKENS, 1], tl.int32)
            high = tl.where(w + width < DIM, tl.gather(nibble, tl.minimum(w + width, PADDED - 1), 1), 0)
            value = tl.gather(nibble, w, 1) | (high << 4)
        else:
            value = (tl.clamp(y, -128.0, 127.0) + ROUND) - ROUND
    put(value, slots, live, head, codes, HEADS, width, BLOCK, BY_COLUMN)


@triton.jit
def keep(
    x, x_token, x_head, row, inside_step, head, slots, raw_slots, hand_slots, codes, scales, raw, hand,
    mu, reciprocal, limits, token_reciprocal, saturated,
    WRITES: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, ROTATED: tl.constexpr, STATIC: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Rows [TOKENS] of one head of K or of V: codes into the cache and, where the format has edges, themselves into raw
    pages, those of the cache and those in hand; slot −1 is nowhere."""
    d = tl.arange(0, PADDED)
    x = tl.load(
        x + (row.to(tl.int64) * x_token + head * x_head)[:, None] + d[None, :],
        inside_step[:, None] & (d < DIM)[None, :],
        0.0,
    )
    if WRITES:
        slot = tl.load(slots + row, inside_step, -1)
        encode(x, tl.maximum(slot, 0), slot >= 0, head, codes, scales, mu, reciprocal, limits, token_reciprocal,
               saturated, HEADS, DIM, PADDED, TOKENS, BLOCK, KIND, BITS, ROTATED, STATIC, BY_COLUMN)  # fmt: skip
        if raw_slots is not None:
            slot = tl.load(raw_slots + row, inside_step, -1)
            put(x, tl.maximum(slot, 0), slot >= 0, head, raw, HEADS, DIM, BLOCK, False)
    if hand_slots is not None:
        slot = tl.load(hand_slots + row, inside_step, -1)
        put(x, tl.maximum(slot, 0), slot >= 0, head, hand, HEADS, DIM, BLOCK, False)


@triton.jit
def fold(
    q, line, live, head, c, mu, folded, factor, shift, unit,
    DIM: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    INTEGER: tl.constexpr, ROTATED: tl.constexpr, STATIC: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """q̃ = R(q ∘ c) of queries [TOKENS, PADDED] that belong to KV head `head`, as what the codes are multiplied with:
    two int8 against integer codes, else the codes' own type. `factor` turns the product into a score in units of
    `unit`, `shift` is q·mu in the same units."""
    d = tl.arange(0, PADDED)
    inside = live[:, None] & (d < DIM)[None, :]
    if INTEGER:
        y = q.to(tl.float32)
        if SHIFT:
            middle = tl.load(mu + head * DIM + d, d < DIM, 0.0)
            tl.store(shift + line, tl.sum(y * middle[None, :], 1) * unit, live)
        if STATIC:
            y = y * tl.load(c + head * DIM + d, d < DIM, 0.0)[None, :]
        if ROTATED:
            y = rotate(y, TOKENS, PADDED, DIM)
        largest = tl.maximum(tl.max(tl.abs(y), 1), 1e-30)
        y = (y / largest[:, None] * QUERY_STEPS + ROUND) - ROUND
        high = tl.floor((y + 64) / 128)
        place = folded + (line * 2 * DIM)[:, None] + d[None, :]
        tl.store(place, high.to(tl.int8), inside)
        tl.store(place + DIM, (y - 128 * high).to(tl.int8), inside)
        tl.store(factor + line, largest * (unit / QUERY_STEPS), live)
    else:
        if STATIC:  # of fp8, whose mu is 0
            q = q.to(tl.float32) * tl.load(c + head * DIM + d, d < DIM, 0.0)[None, :]
        if SHIFT:
            tl.store(shift + line, tl.zeros([TOKENS], tl.float32), live)
        tl.store(folded + (line * DIM)[:, None] + d[None, :], q.to(folded.dtype.element_ty), inside)
        tl.store(factor + line, tl.zeros([TOKENS], tl.float32) + unit, live)


# What differs from step to step must not compile anew: the number of tokens, and where in a packed copy the slots lie.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["slots", "raw_slots", "hand_slots"])
def write(
    q, k, v, slots, raw_slots, hand_slots, tokens, q_token, q_head, k_token, k_head, v_token, v_head,
    k_codes, k_scales, k_raw, k_hand, k_mu, k_c, k_reciprocal, k_limits, k_token_reciprocal, k_saturated,
    v_codes, v_scales, v_raw, v_hand, v_mu, v_reciprocal, v_limits, v_token_reciprocal, v_saturated,
    folded, factor, shift, unit,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WRITES: tl.constexpr, SHIFT: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    K_DIM: tl.constexpr, K_PADDED: tl.constexpr, K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_ROTATED: tl.constexpr,
    K_STATIC: tl.constexpr,
    V_DIM: tl.constexpr, V_PADDED: tl.constexpr, V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_ROTATED: tl.constexpr,
    V_STATIC: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tokens i·TOKENS … of one head j, the query heads first, then those of K, then those of V.

    `raw_slots` and `hand_slots` are None where the format has no edges, and where the step has no chunk.
    """
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    live = row < tokens
    heads: tl.constexpr = KV_HEADS * GROUP
    if head < heads:
        wide, d = row.to(tl.int64), tl.arange(0, K_PADDED)
        query = tl.load(
            q + (wide * q_token + head * q_head)[:, None] + d[None, :], live[:, None] & (d < K_DIM)[None, :], 0.0
        )
        fold(query, wide * heads + head, live, head // GROUP, k_c, k_mu, folded, factor, shift, unit,
             K_DIM, K_PADDED, TOKENS, K_KIND == "static" or K_KIND == "token", K_ROTATED, K_STATIC, SHIFT)  # fmt: skip
    elif head < heads + KV_HEADS:
        keep(k, k_token, k_head, row, live, head - heads, slots, raw_slots, hand_slots, k_codes, k_scales, k_raw,
             k_hand, k_mu, k_reciprocal, k_limits, k_token_reciprocal, k_saturated, WRITES, KV_HEADS, K_DIM, K_PADDED,
             TOKENS, BLOCK, K_KIND, K_BITS, K_ROTATED, K_STATIC, False)  # fmt: skip
    else:
        keep(v, v_token, v_head, row, live, head - heads - KV_HEADS, slots, raw_slots, hand_slots, v_codes, v_scales,
             v_raw, v_hand, v_mu, v_reciprocal, v_limits, v_token_reciprocal, v_saturated, WRITES, KV_HEADS, V_DIM,
             V_PADDED, TOKENS, BLOCK, V_KIND, V_BITS, V_ROTATED, V_STATIC, V_KIND != "raw")  # fmt: skip
