"""Where the rows of a block lie in memory.

A layout is a value: the device and the kernel choose it, and whoever wants rows (the reference, tests, saved sessions)
asks `write_rows` and `read_rows` and knows nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

LANES = 16  # 32-bit lanes of the widest register that reads a row of V
SLACK = 64  # bytes after the last block where rows are no whole registers: the last one reads beyond the row's end


@dataclass(frozen=True)
class Layout:
    """How the `block_size` rows of one head of one block lie: row by row, in the `tiles` that the CPU kernels read, or
    in the `pages` that the GPU kernels read.

        rows      [block_size, width]: one row after the other
        k-tiles   codes of a byte [width/4, block_size, 4], others [width, block_size]: the same dimensions of
                  neighbouring tokens side by side, which is what a dot product of many tokens with a query reads
        v-tiles   codes of a byte [block_size/4, width, 4], others as rows: four tokens of the same dimension side by
                  side, which is what a weighted sum over tokens reads

        k-pages   as rows: dimensions side by side
        v-pages   codes of a byte [width, block_size], others as rows: tokens side by side. Each operand of a product
                  lies along its sum, as the tensor cores take bytes

    In k-tiles an int8 code is stored as uint8, code + 128: x86's dot product is of unsigned with signed bytes.
    """

    block_size: int = 64
    order: Literal["rows", "tiles", "k-tiles", "v-tiles", "pages", "k-pages", "v-pages"] = "rows"

    def of(self, side: Literal["k", "v"]) -> Layout:
        """The layout of one side: tiles and pages differ between K and V."""
        return replace(self, order=f"{side}-{self.order}") if self.order in ("tiles", "pages") else self  # type: ignore[arg-type]

    def allocate(self, num_blocks: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of `num_blocks` blocks, [num_blocks, heads, …] with the rest as above."""
        # Zeros, not empty: a raw row that was never written is masked by a weight of 0, and 0·NaN would be NaN.
        shape = (num_blocks, heads, *self._shape(width, dtype))
        slack = SLACK // dtype.itemsize if self.order == "v-tiles" and width % LANES else 0
        size = torch.Size(shape).numel()
        return torch.zeros(size + slack, dtype=dtype, device=device)[:size].view(shape)

    def write_rows(self, memory: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Put rows [tokens, heads, width] into the slots [tokens], int64; slot = block·block_size + place in it."""
        block, place = slots // self.block_size, slots % self.block_size
        if not self._tiled(memory.dtype) or self.order == "v-pages":
            self._by_token(memory)[block, :, place] = rows
        elif self.order == "k-tiles":
            if memory.dtype == torch.int8:
                rows = rows ^ -128
            self._by_token(memory)[block, :, place] = rows.contiguous().view(torch.int32)
        else:
            self._by_token(memory)[block, :, place // 4, place % 4] = rows

    def read_rows(self, memory: Tensor, blocks: Tensor) -> Tensor:
        """All rows of the blocks [n]: a copy [heads, n·block_size, width]."""
        rows = self._by_token(memory[blocks]).transpose(0, 1)  # [heads, n, block_size, width], of v-tiles with one more
        heads, width = rows.shape[0], rows.shape[-1] * rows.dtype.itemsize // memory.dtype.itemsize
        rows = rows.reshape(-1).view(memory.dtype)  # where they were words
        rows = rows.view(heads, len(blocks) * self.block_size, width)
        if self.order == "k-tiles" and rows.dtype == torch.int8:
            rows ^= -128
        return rows

    def _tiled(self, dtype: torch.dtype) -> bool:
        return self.order in ("k-tiles", "v-tiles", "v-pages") and dtype.itemsize == 1

    def _shape(self, width: int, dtype: torch.dtype) -> tuple[int, ...]:
        size = self.block_size
        if self.order == "k-tiles":
            return (width // 4, size, 4) if self._tiled(dtype) else (width, size)
        if self.order == "v-pages" and self._tiled(dtype):
            return (width, size)
        return (size // 4, width, 4) if self._tiled(dtype) else (size, width)

    def _by_token(self, memory: Tensor) -> Tensor:
        """A view of [n, heads, …] whose third dimension (of v-tiles the third and fourth) counts tokens. The four bytes
        of a k-tile that stay together are a word there."""
        if self.order == "k-tiles" and self._tiled(memory.dtype):
            return memory.view(torch.int32)[..., 0].transpose(2, 3)
        if self.order == "k-tiles" or (self.order == "v-pages" and self._tiled(memory.dtype)):
            return memory.transpose(2, 3)
        return memory.transpose(3, 4) if self._tiled(memory.dtype) else memory
