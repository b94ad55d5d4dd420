"""The end of attention: the splits of a row are joined, and V's static part is applied."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.attention.cuda.codes import rotate
from octavo.attention.cuda.scan import NOTHING


@triton.jit(do_not_specialize=["splits"])
def combine(
    sums, tops, totals, tiles, q_start, shift, sinks, c, mu, out, lift, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, MOST_SPLITS: tl.constexpr,
    SINKS: tl.constexpr, ROTATED: tl.constexpr, STATIC: tl.constexpr, SHIFT: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Program (i, head, j): queries j·ROWS … of tile i, which has QUERIES of them. `lift` is LIFT in scan.py;
    `splits` are at most MOST_SPLITS, and with EDGES a part of raw rows follows them."""
    head = tl.program_id(1)
    sequence, first = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    row = tl.load(q_start + sequence)
    new = tl.load(q_start + sequence + 1) - row
    within = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    live = (within < QUERIES) & (first + within < new)
    line = (row + first + within).to(tl.int64) * HEADS + head
    d = tl.arange(0, PADDED)

    split = tl.arange(0, MOST_SPLITS)[None, :]
    parts = splits + (1 if EDGES else 0)
    own = ((tl.program_id(0) * QUERIES + within).to(tl.int64) * HEADS + head) * parts  # the first part of each row
    part = own[:, None] + split
    there = live[:, None] & (split < splits)
    tops_ = tl.load(tops + part, there, NOTHING)
    if SHIFT:  # the same for every code of a row, so its weights do not change
        tops_ += tl.load(shift + line, live, 0.0)[:, None]
    totals_ = tl.load(totals + part, there, 0.0)
    top = tl.max(tops_, 1)
    if EDGES:
        raw_top = tl.load(tops + own + splits, live, NOTHING)
        top = tl.maximum(top, raw_top)
    share = tl.exp2(tops_ - top[:, None])
    filled = (totals_ > 0)[:, :, None] & (d < DIM)[None, None, :]
    x = tl.sum(tl.load(sums + part[:, :, None] * DIM + d[None, None, :], filled, 0.0) * share[:, :, None], 1)
    total = tl.sum(totals_ * share, 1)

    whole = total
    if EDGES:
        raw_share = tl.exp2(raw_top - top)
        raw_total = tl.load(totals + own + splits, live, 0.0)
        whole += raw_total * raw_share
    if SINKS:
        whole += tl.exp2(tl.load(sinks + head) * 1.4426950408889634 + lift - top)
    whole = tl.maximum(whole, 1e-37)  # a row that saw nothing is 0, not 0/0
    x = x / whole[:, None]
    if ROTATED:
        x = rotate(x, ROWS, PADDED, DIM)
    if STATIC:
        of_head = head // GROUP * DIM + d
        x = x * tl.load(c + of_head, d < DIM, 0.0)[None, :]
        x += (total / whole)[:, None] * tl.load(mu + of_head, d < DIM, 0.0)[None, :]
    if EDGES:
        filled = (raw_total > 0)[:, None] & (d < DIM)[None, :]
        raw = tl.load(sums + ((own + splits) * DIM)[:, None] + d[None, :], filled, 0.0)
        x += raw * (raw_share / whole)[:, None]
    tl.store(out + (line * DIM)[:, None] + d[None, :], x.to(out.dtype.element_ty), live[:, None] & (d < DIM)[None, :])
