"""Attention on codes in plain torch: slow, obviously right, every feature, any device.

With q̃ = R(q ∘ c_k) and weights p_t, the folded formula needs no decoded K or V:

    score_t = s_t·(q̃·code_t) + q·mu_k          out = c_v ∘ Rᵀ(Σ_t p_t s_t code_t) + (Σ_t p_t)·mu_v

where code_t is centered (4-bit codes less 7.5). With edges, page 0 and a query's own span are read raw: their scores
are q·k, and the sums of their v join those of codes over one denominator. The context is read a tile of blocks at a
time with a running softmax (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"), so no copy of the
cache exists in any form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec, Backend
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.row_store import RowStore
from octavo.cache.store import LayerCache

TILE_ELEMENTS = 1 << 21  # of the largest float32 temporary of a tile: 8 MB, about a core's share of cache
TILE_TOKENS = 1 << 11  # a longer sum in float32 would lose the end of a long flat tail
NOTHING = -1e30  # the running maximum of a row that has seen nothing; finite, so that differences are not NaN


@dataclass
class Group:
    """Sequences with equally many new tokens and contexts of similar length: one batched computation."""

    rows: Tensor  # [B·n] rows of the step
    table: Tensor  # [B, blocks]
    kv_len: Tensor  # [B]
    new: int  # n
    longest: int  # no kv_len is longer
    masks: dict[tuple[int, int, int | None, int], Tensor | None] = field(default_factory=dict)

    def hidden(self, start: int, stop: int, window: int | None, span: int) -> Tensor | None:
        """True where a query must not see a code: [B, n, 1, stop − start] for those of keys start…stop; None if it sees
        all. Of its own span it sees none."""
        key = (start, stop, window, span)
        if key not in self.masks:
            query = (self.kv_len[:, None] - self.new + torch.arange(self.new, device=self.table.device))[:, :, None]
            keys = torch.arange(start, stop, device=self.table.device)
            hidden = keys >= query // span * span if span else keys > query
            if window is not None:
                hidden |= keys <= query - window
            self.masks[key] = hidden[:, :, None] if hidden.any() else None
        return self.masks[key]


def groups(batch: Batch, block_size: int) -> list[Group]:
    """The step's groups, made once and kept for all layers."""
    if "groups" not in batch.plan:
        members: dict[tuple[int, int], list[int]] = {}
        for i, (new, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
            # Up to 16 blocks are one size class, then one class for each power of two.
            members.setdefault((new, max(4, (kv_len // block_size).bit_length())), []).append(i)
        starts = [0, *accumulate(batch.q_lens)]
        device = batch.block_table.device
        batch.plan["groups"] = [
            Group(
                rows=torch.tensor([starts[i] + j for i in indices for j in range(new)], device=device),
                table=batch.block_table[torch.tensor(indices, device=device)],
                kv_len=batch.kv_len[torch.tensor(indices, device=device)],
                new=new,
                longest=max(batch.kv_lens[i] for i in indices),
            )
            for (new, _), indices in members.items()
        ]
    return batch.plan["groups"]


def attend(spec: AttentionSpec, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """As `octavo.attention.attend`."""
    own = [] if cache.raw is None else _own_rows(cache, k, v, batch)  # before this step's rows overwrite the ring
    if spec.shape.shares is None:
        cache.write(k, v, batch.slots, batch.raw_slots)
    return read(spec, cache, q, batch, own)


def read(spec: AttentionSpec, cache: LayerCache, q: Tensor, batch: Batch, own: Sequence[OwnRows] = ()) -> Tensor:
    """Attention of q [T, heads, k_dim] over what is stored, in any layout, and where the format has edges over the raw
    rows of each sequence's `own`: [T, heads, v_dim]."""
    dtype = q.dtype
    q = (q.float() * spec.scale).unflatten(1, (cache.k.heads, -1))  # [T, kv_heads, G, k_dim]
    folded = cache.k.fold(q)
    # q·mu is the same for every code: plain softmax does not see it; a soft cap, a sink and raw rows do.
    shift = None
    if cache.k.static is not None and (spec.softcap is not None or spec.sinks is not None or cache.span):
        shift = (q * cache.k.static.mu[:, None]).sum(-1, keepdim=True)
    coded = Sums.of(q, cache.v.dim)
    for group in groups(batch, cache.k.layout.block_size):
        coded.put(group.rows, _attend_group(spec, cache, folded, shift, group))
    raw = torch.zeros_like(coded.out)
    for i, rows in enumerate(own):
        _attend_raw(spec, cache, q, batch, i, rows, coded, raw)

    denominator = coded.total if not own else coded.total + coded.raw_total
    if spec.sinks is not None:
        denominator = denominator + (spec.sinks.float().view(cache.k.heads, -1, 1) - coded.top).exp()
    denominator = denominator.clamp(min=torch.finfo(torch.float32).tiny)  # a row that saw nothing is 0, not 0/0
    out = cache.v.unfold(coded.out / denominator, coded.total / denominator)
    return (out + raw / denominator if own else out).flatten(1, 2).to(dtype)


@dataclass
class Sums:
    """What rows have seen so far, relative to e^top: [T, kv_heads, G, ·]."""

    top: Tensor  # the largest score
    total: Tensor  # Σ p of codes
    out: Tensor  # Σ p s code
    raw_total: Tensor  # Σ p of raw rows

    @classmethod
    def of(cls, q: Tensor, v_dim: int) -> Sums:
        one = q.new_zeros(*q.shape[:3], 1)
        return cls(torch.full_like(one, NOTHING), one, q.new_zeros(*q.shape[:3], v_dim), torch.zeros_like(one))

    def put(self, rows: Tensor, sums: tuple[Tensor, Tensor, Tensor]) -> None:
        self.out[rows], self.total[rows], self.top[rows] = sums


OwnRows = tuple[int, Tensor, Tensor]
"""The raw rows of a sequence beyond page 0 that its new queries may see: the position of the first, K and V [rows,
kv_heads, dim]."""


def _own_rows(cache: LayerCache, k: Tensor, v: Tensor, batch: Batch) -> list[OwnRows]:
    """From the ring as it was before the step, and from the rows in hand."""
    raw, span, size = cache.raw, cache.span, cache.layout.block_size
    assert raw is not None
    _, _, rings = batch.edges
    kept = batch.plan.setdefault(("ring", id(cache)), {})  # a layer that shares this cache comes when it is overwritten
    found: list[OwnRows] = []
    end = 0
    for i, (n, kv_len) in enumerate(zip(batch.q_lens, batch.kv_len.tolist(), strict=True)):
        start, end = end, end + n
        past = max(0, kv_len - n)
        begin = max(size, past // span * span)
        if i not in kept:
            ring = rings[i] + torch.arange(span // size, device=k.device)
            places = torch.arange(begin, max(begin, past), device=k.device) % span
            kept[i] = [store.layout.read_rows(store.codes, ring)[:, places].transpose(0, 1) for store in raw]
        new = slice(start + max(0, begin - past), end)  # those of page 0 are read from their page
        both = (torch.cat([old, x[new].to(old.dtype)]) for old, x in zip(kept[i], (k, v), strict=True))
        found.append((begin, *both))
    return found


def _attend_raw(
    spec: AttentionSpec, cache: LayerCache, q: Tensor, batch: Batch, i: int, own: OwnRows, seen: Sums, out: Tensor
) -> None:
    """Add what the queries of sequence i see of page 0 and of their own spans to `seen` and `out`; one own span after
    the other."""
    raw, span = cache.raw, cache.span
    assert raw is not None
    _, first, _ = batch.edges
    kv_len, n, begin = int(batch.kv_len[i]), batch.q_lens[i], own[0]
    if kv_len == 0:  # a padded row
        return
    first_row = sum(batch.q_lens[:i]) - (kv_len - n)  # the row of the query at position t is this + t
    page = [store.layout.read_rows(store.codes, first[i : i + 1])[:, :kv_len].transpose(0, 1) for store in raw]
    for start in range((kv_len - n) // span * span, kv_len, span):
        t = torch.arange(max(start, kv_len - n), min(start + span, kv_len), device=q.device)
        mine = slice(max(0, start - begin), start + span - begin) if start + span > begin else slice(0)
        keys, values = (torch.cat([p, o[mine]]).float() for p, o in zip(page, own[1:], strict=True))
        first_own = max(begin, start)
        places = torch.arange(first_own, first_own + len(keys) - len(page[0]), device=q.device)
        at = torch.cat([torch.arange(len(page[0]), device=q.device), places])
        hidden = at > t[:, None]
        if spec.window is not None:
            hidden |= at <= t[:, None] - spec.window
        rows = first_row + t
        score = torch.einsum("nhgd,mhd->nhgm", q[rows], keys)
        if spec.softcap is not None:
            score = spec.softcap * torch.tanh(score / spec.softcap)
        score.masked_fill_(hidden[:, None, None], -torch.inf)
        top = torch.maximum(seen.top[rows], score.amax(-1, keepdim=True))
        keep, weights = (seen.top[rows] - top).exp(), (score - top).exp()
        seen.out[rows] *= keep
        seen.total[rows] *= keep
        seen.raw_total[rows] = weights.sum(-1, keepdim=True)
        seen.top[rows] = top
        out[rows] = torch.einsum("nhgm,mhd->nhgd", weights, values)


def _attend_group(
    spec: AttentionSpec, cache: LayerCache, folded: Tensor, shift: Tensor | None, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one group's rows (Σ p s code [B·n, kv_heads, G, v_dim], Σ p and the largest score [B·n, kv_heads, G, 1])."""
    sequences, n = len(group.table), group.new
    kv_heads, size = cache.k.heads, cache.k.layout.block_size

    def by_head(x: Tensor) -> Tensor:  # rows of the step → [kv_heads, B, n·G, ·]
        return x[group.rows].unflatten(0, (sequences, n)).permute(2, 0, 1, 3, 4).flatten(2, 3)

    q = by_head(folded)
    base = by_head(shift) if shift is not None else None
    top = q.new_full((*q.shape[:3], 1), NOTHING)
    total = torch.zeros_like(top)
    out = q.new_zeros(*q.shape[:3], cache.v.dim)

    first = 0 if spec.window is None else max(0, int(group.kv_len.min()) - n + 1 - spec.window) // size
    last = -(-group.longest // size)
    if cache.span:  # page 0 and the last own span are read raw
        first, last = max(1, first), max(0, group.longest - 1) // cache.span * (cache.span // size)
    per_token = max(sequences * kv_heads * max(cache.k.dim, cache.v.dim), q.shape[:3].numel())
    step = max(1, min(TILE_ELEMENTS // per_token, TILE_TOKENS) // size)
    for block in range(first, last, step):
        end = min(block + step, last)
        blocks = group.table[:, block:end].flatten()
        keys, scale = _read(cache.k, blocks, sequences)
        score = q @ keys.transpose(2, 3)  # [kv_heads, B, n·G, tokens]
        if scale is not None:
            score *= scale
        if base is not None:
            score += base
        if spec.softcap is not None:
            score = spec.softcap * torch.tanh(score / spec.softcap)
        hidden = group.hidden(block * size, end * size, spec.window, cache.span)
        if hidden is not None:
            score.unflatten(2, (n, -1)).masked_fill_(hidden, -torch.inf)

        higher = torch.maximum(top, score.amax(-1, keepdim=True))
        weights = score.sub_(higher).exp_()
        keep = (top - higher).exp_()
        total = total * keep + weights.sum(-1, keepdim=True)
        values, scale = _read(cache.v, blocks, sequences)
        if scale is not None:
            weights *= scale
        if hidden is not None and cache.v.codec.is_raw:  # a weight of 0 does not undo a NaN of a last owner
            values.masked_fill_(hidden.all(1).mT, 0)
        out = out * keep + weights @ values
        top = higher

    def by_row(x: Tensor) -> Tensor:  # [kv_heads, B, n·G, ·] → [B·n, kv_heads, G, ·]
        return x.unflatten(2, (n, -1)).permute(1, 2, 0, 3, 4).flatten(0, 1)

    return by_row(out), by_row(total), by_row(top)


def _read(store: RowStore, blocks: Tensor, sequences: int) -> tuple[Tensor, Tensor | None]:
    """A tile: centered codes [kv_heads, B, tokens, dim] and scales [kv_heads, B, 1, tokens] or None."""
    codes, scales = store.read(blocks)
    codes = codes.unflatten(1, (sequences, -1))
    return codes, scales.unflatten(1, (sequences, 1, -1)) if scales is not None else None


BACKEND = Backend("reference", Layout(), attend, refuses=lambda _: None)
