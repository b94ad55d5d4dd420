"""Where the rows of a block lie in memory.

A layout is a value: the device and the kernel choose it, and whoever wants rows (the reference, tests, saved sessions)
asks `write_rows` and `read_rows` and knows nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Row-major blocks: a tensor [num_blocks, heads, block_size, width], each head's rows of a block contiguous."""

    block_size: int = 64

    def allocate(self, num_blocks: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        # Zeros, not empty: a raw row that was never written is masked by a weight of 0, and 0·NaN would be NaN.
        return torch.zeros(num_blocks, heads, self.block_size, width, dtype=dtype, device=device)

    def write_rows(self, memory: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Put rows [tokens, heads, width] into the slots [tokens], int64; slot = block·block_size + place in it."""
        memory[slots // self.block_size, :, slots % self.block_size] = rows

    def read_rows(self, memory: Tensor, blocks: Tensor) -> Tensor:
        """All rows of the blocks [n]: a copy [heads, n·block_size, width]."""
        rows = memory[blocks].transpose(0, 1)
        return rows.reshape(rows.shape[0], -1, rows.shape[-1])
