"""Attention on codes in plain torch: slow, obviously right, every feature, any device.

With q̃ = R(q ∘ c_k) and weights p_t, the folded formula (DESIGN, "the one idea") needs no decoded K or V:

    score_t = s_t·(q̃·code_t) + q·mu_k          out = c_v ∘ Rᵀ(Σ_t p_t s_t code_t) + (Σ_t p_t)·mu_v

where code_t is centered (4-bit codes less 7.5). The context is read a tile of blocks at a time with a running softmax
(Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"), so no copy of the cache exists in any form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec, Backend
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.store import LayerCache, RowStore

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
    masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)

    def hidden(self, start: int, stop: int, window: int | None) -> Tensor | None:
        """True where a query must not see a key: [B, n, 1, stop − start] for keys start…stop; None if it sees all."""
        key = (start, stop, window)
        if key not in self.masks:
            query = (self.kv_len[:, None] - self.new + torch.arange(self.new, device=self.table.device))[:, :, None]
            keys = torch.arange(start, stop, device=self.table.device)
            hidden = keys > query
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
    if spec.shape.shares is None:
        cache.write(k, v, batch.slots)
    return read(spec, cache, q, batch)


def read(spec: AttentionSpec, cache: LayerCache, q: Tensor, batch: Batch) -> Tensor:
    """Attention of q [T, heads, k_dim] over what is stored, in any layout: [T, heads, v_dim]."""
    dtype = q.dtype
    q = (q.float() * spec.scale).unflatten(1, (cache.k.heads, -1))  # [T, kv_heads, G, k_dim]
    folded = cache.k.fold(q)
    # q·mu is the same for every key: plain softmax does not see it, a soft cap and a sink do.
    shift = None
    if cache.k.static is not None and (spec.softcap is not None or spec.sinks is not None):
        shift = (q * cache.k.static.mu[:, None]).sum(-1, keepdim=True)
    out = q.new_empty(*q.shape[:3], cache.v.dim)
    weight = q.new_empty(*q.shape[:3], 1)
    for group in groups(batch, cache.k.layout.block_size):
        out[group.rows], weight[group.rows] = _attend_group(spec, cache, folded, shift, group)
    return cache.v.unfold(out, weight).flatten(1, 2).to(dtype)


def _attend_group(
    spec: AttentionSpec, cache: LayerCache, folded: Tensor, shift: Tensor | None, group: Group
) -> tuple[Tensor, Tensor]:
    """(Σ p s code [B·n, kv_heads, G, v_dim], Σ p [B·n, kv_heads, G, 1]) of one group's rows."""
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
        hidden = group.hidden(block * size, end * size, spec.window)
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

    denominator = total
    if spec.sinks is not None:
        sinks = spec.sinks.float().view(kv_heads, 1, 1, -1).expand(-1, 1, n, -1).reshape(kv_heads, 1, -1, 1)
        denominator = total + (sinks - top).exp()
    denominator = denominator.clamp(min=torch.finfo(torch.float32).tiny)  # a row that saw nothing is 0, not 0/0

    def by_row(x: Tensor) -> Tensor:  # [kv_heads, B, n·G, ·] → [B·n, kv_heads, G, ·]
        return x.unflatten(2, (n, -1)).permute(1, 2, 0, 3, 4).flatten(0, 1)

    return by_row(out / denominator), by_row(total / denominator)


def _read(store: RowStore, blocks: Tensor, sequences: int) -> tuple[Tensor, Tensor | None]:
    """A tile: centered codes [kv_heads, B, tokens, dim] and scales [kv_heads, B, 1, tokens] or None."""
    codes, scales = store.read(blocks)
    codes = codes.unflatten(1, (sequences, -1))
    return codes, scales.unflatten(1, (sequences, 1, -1)) if scales is not None else None


BACKEND = Backend("reference", Layout(), attend, refuses=lambda _: None)
