"""The codes of one side, K or V, of one layer; how its static part is folded into queries and out of output rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.cache.layout import Layout
from octavo.cache.plan import Side
from octavo.quant.codec import Static, centered, encode, rotate, token_scale
from octavo.quant.format import Codec


class RowStore:
    """One side, K or V, of one layer."""

    def __init__(
        self,
        codec: Codec,
        heads: int,
        dim: int,
        static: Static | None,
        layout: Layout,
        side: Side,
        num_blocks: int,
        device: torch.device,
    ):
        self.codec, self.heads, self.dim = codec, heads, dim
        self.static = static.to(device) if static is not None else None
        self.layout, self.scale_layout = layout.of(side, codec, dim), layout.of_scales
        self.codes = self.layout.allocate(num_blocks, heads, device)
        self.scales = self.scale_layout.allocate(num_blocks, heads, device) if codec.has_token_scale else None
        self.saturated = torch.zeros((), dtype=torch.int64, device=device)
        self.written = 0  # values
        self.native: Any = None  # what a native kernel keeps of this store, and nothing that holds the store itself

    def write(self, x: Tensor, slots: Tensor) -> None:
        """Encode rows x [tokens, heads, dim] into slots [tokens]; slot −1 writes nowhere and counts nothing."""
        if (nowhere := slots < 0).any():
            x, slots = x[~nowhere], slots[~nowhere]
        rows = encode(x, self.codec, self.static)
        self.layout.write_rows(self.codes, slots, rows.codes)
        if self.scales is not None and rows.scales is not None:
            self.scale_layout.write_rows(self.scales, slots, rows.scales[..., None])
        if rows.saturated is not None:
            self.saturated += rows.saturated
        self.written += x.numel()

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Centered codes float32 [heads, n·block_size, dim] of blocks [n], and the token scales [heads, n·block_size]
        or None. Of a few blocks at a time: this is a tile, not the cache."""
        codes = centered(self.layout.read_rows(self.codes, blocks), self.codec, self.dim)
        if self.scales is None:
            return codes, None
        return codes, token_scale(self.scale_layout.read_rows(self.scales, blocks)[..., 0], self.codec)

    def decode(self, blocks: Tensor) -> Tensor:
        """The float32 values [n·block_size, heads, dim] that the codes of blocks [n] stand for. Attention never needs
        them."""
        codes, scales = self.read(blocks)
        if scales is not None:
            codes = codes * scales[..., None]
        return self.unfold(codes.transpose(0, 1)[:, :, None], torch.ones((), device=codes.device))[:, :, 0]

    def take(self, source: RowStore, blocks: Tensor, num_blocks: int) -> None:
        """Have memory of `num_blocks` blocks, at least n, that begins with the blocks [n] of `source`: a store of the
        same layout and codec, or this one."""
        pairs = [(source.codes, self.layout)]
        if source.scales is not None:
            pairs.append((source.scales, self.scale_layout))
        with torch.inference_mode(False):  # a later step may be outside of it
            memory = [layout.allocate(num_blocks, self.heads, old.device) for old, layout in pairs]
        for new, (old, _) in zip(memory, pairs, strict=True):
            new[: len(blocks)] = old[blocks.to(old.device)]
        self.codes, self.scales = memory[0], memory[1] if len(memory) > 1 else None
        self.native = None  # it points to the old memory

    def copy_blocks(self, blocks: Tensor, to: Tensor) -> None:
        """Have in the blocks `to` [n] what blocks [n] hold."""
        for memory in (self.codes, self.scales):
            if memory is not None:
                memory[to.to(memory.device)] = memory[blocks.to(memory.device)]

    def fold(self, q: Tensor) -> Tensor:
        """q̃ = R(q ∘ c) for queries [tokens, heads, group, dim]: q̃·code is q·x up to a term equal for every key."""
        if self.static is not None:
            q = q * self.static.c[:, None]
        return rotate(q) if self.codec.rotated else q

    def unfold(self, out: Tensor, weight: Tensor) -> Tensor:
        """c ∘ Rᵀ(out) + weight·mu for weighted sums of codes `out` [tokens, heads, group, dim], where `weight`
        [tokens, heads, group, 1] is the sum of the weights."""
        if self.codec.rotated:
            out = rotate(out)
        if self.static is None:
            return out
        return out * self.static.c[:, None] + weight * self.static.mu[:, None]

    @property
    def num_blocks(self) -> int:
        return len(self.codes)

    @property
    def scale_nbytes(self) -> int:
        return self.scales.nbytes if self.scales is not None else 0

    @property
    def nbytes(self) -> int:
        """Of the memory behind the tensors: what a layout keeps beside the blocks is counted too."""
        return self.codes.untyped_storage().nbytes() + self.scale_nbytes

    @property
    def static_nbytes(self) -> int:
        return self.static.mu.nbytes + self.static.c.nbytes + self.static.reciprocal.nbytes if self.static else 0
