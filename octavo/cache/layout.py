"""Where the rows of a block lie in memory.

A layout is a value: a backend of attention has one for whole caches (`Layout`), and from it and a codec follows that of
one side of one layer (`RowLayout`). Whoever wants rows (the reference, tests, saved sessions) asks `write_rows` and
`read_rows` and knows nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.devices import device_of
from octavo.quant.format import BLOCK, Codec

LANES = 16  # 32-bit lanes of the widest register that reads a row of V
SLACK = 64  # bytes after the last block where rows are no whole registers: the last one reads beyond the row's end

Order = Literal["rows", "columns", "k-tiles", "v-tiles"]
# By a cache's order and the side: of codes of a byte, and of raw rows. Rows elsewhere.
ORDERS: dict[tuple[str, str], tuple[Order, Order]] = {
    ("tiles", "k"): ("k-tiles", "columns"),
    ("tiles", "v"): ("v-tiles", "rows"),
    ("pages", "v"): ("columns", "rows"),
}


@dataclass(frozen=True)
class Layout:
    """How the blocks of a cache lie: row by row, in the `tiles` that the CPU kernels read, or in the `pages` that the
    GPU kernels read, where each operand of a product lies along its sum, as the tensor cores take bytes."""

    block_size: int = BLOCK
    order: Literal["rows", "tiles", "pages"] = "rows"

    def of(self, side: Literal["k", "v"], codec: Codec, dim: int) -> RowLayout:
        """The layout of one side's rows of `dim` values in that codec."""
        of_bytes, of_raw = ORDERS.get((self.order, side), ("rows", "rows"))
        slack = SLACK if (self.order, side) == ("tiles", "v") and codec.width(dim) % LANES else 0
        # The CPU kernels read fp8 as they read numbers of two bytes.
        order = of_raw if codec.is_raw or (self.order == "tiles" and codec.kind == "float") else of_bytes
        return RowLayout(order, self.block_size, codec.width(dim), getattr(torch, codec.dtype), slack)

    @property
    def of_scales(self) -> RowLayout:
        """That of one byte a row: there is nothing to tile."""
        return RowLayout("rows", self.block_size, 1, torch.uint8)


@dataclass(frozen=True)
class RowLayout:
    """How the `block_size` rows of one head of one block lie, each of `width` elements:

        rows      [block_size, width]: one row after the other
        columns   [width, block_size]: the same element of neighbouring tokens side by side
        k-tiles   bytes [width/4, block_size, 4]: the same four dimensions of neighbouring tokens side by side, which is
                  what a dot product of many tokens with a query reads
        v-tiles   bytes [block_size/4, width, 4]: four tokens of the same dimension side by side, which is what a
                  weighted sum over tokens reads

    In k-tiles an int8 code is stored as uint8, code + 128: x86's dot product is of unsigned with signed bytes.
    """

    order: Order
    block_size: int
    width: int
    dtype: torch.dtype
    slack: int = 0  # bytes after the last block

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one head of one block."""
        size, width = self.block_size, self.width
        return {
            "rows": (size, width), "columns": (width, size), "k-tiles": (width // 4, size, 4),
            "v-tiles": (size // 4, width, 4),
        }[self.order]  # fmt: skip

    def allocate(self, num_blocks: int, heads: int, device: torch.device) -> Tensor:
        """Memory of `num_blocks` blocks, [num_blocks, heads, …] with the rest as above."""
        # Zeros, not empty: a raw row that was never written is masked by a weight of 0, and 0·NaN would be NaN.
        shape = torch.Size((num_blocks, heads, *self.shape))
        size = shape.numel()
        return device_of(device).zeros([size + self.slack // self.dtype.itemsize], self.dtype)[:size].view(shape)

    def write_rows(self, memory: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Put rows [tokens, heads, width] into the slots [tokens], int64; slot = block·block_size + place in it."""
        block, place = slots // self.block_size, slots % self.block_size
        if self.order == "v-tiles":
            self._by_token(memory)[block, :, place // 4, place % 4] = rows
            return
        if self.order == "k-tiles":
            rows = (rows ^ -128 if self.dtype == torch.int8 else rows).contiguous().view(torch.int32)
        self._by_token(memory)[block, :, place] = rows

    def read_rows(self, memory: Tensor, blocks: Tensor) -> Tensor:
        """All rows of the blocks [n]: a copy [heads, n·block_size, width]."""
        rows = self._by_token(memory[blocks]).transpose(0, 1)  # [heads, n, block_size, width], of v-tiles with one more
        heads = rows.shape[0]
        rows = rows.reshape(-1).view(self.dtype)  # where they were words
        rows = rows.view(heads, len(blocks) * self.block_size, self.width)
        if self.order == "k-tiles" and self.dtype == torch.int8:
            rows ^= -128
        return rows

    def _by_token(self, memory: Tensor) -> Tensor:
        """A view of [n, heads, …] whose third dimension (of v-tiles the third and fourth) counts tokens. The four bytes
        of a k-tile that stay together are a word there."""
        if self.order == "rows":
            return memory
        if self.order == "v-tiles":
            return memory.transpose(3, 4)
        return (memory if self.order == "columns" else memory.view(torch.int32)[..., 0]).transpose(2, 3)
