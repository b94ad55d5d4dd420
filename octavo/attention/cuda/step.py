"""What the kernels need to know of a step: small tensors on the device, built once on the host, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from octavo.cache.batch import Batch


@dataclass
class Step:
    """Index tensors are int32. A tile is (sequence, first of its new tokens) of so many new tokens.

    A CUDA graph keeps its own Step in `batch.plan["cuda"]`: the same tensors, with new lengths copied into `kv_len`.
    Nothing else of a step of decodes depends on more than the number of sequences.
    """

    q_start: Tensor  # [B + 1] rows of the step where each sequence begins
    kv_len: Tensor  # [B]
    q_lens: list[int]
    chosen: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> Step:
        if "cuda" not in batch.plan:
            device = batch.block_table.device
            starts = torch.tensor([0, *accumulate(batch.q_lens)], dtype=torch.int32, device=device)
            batch.plan["cuda"] = cls(
                starts, torch.tensor(batch.kv_lens, dtype=torch.int32, device=device), batch.q_lens
            )
        return batch.plan["cuda"]

    def tiles(self, queries: int) -> Tensor:
        """Tiles [n, 2] of `queries` new tokens that cover the sequences with more than one, those that read most
        first; or, with `queries` 1, the sequences with one."""
        if queries not in self.chosen:
            wanted = [(i, n) for i, n in enumerate(self.q_lens) if (n == 1) == (queries == 1)]
            tiles = [(i, first) for i, n in wanted for first in range(0, n, queries)]
            tiles.sort(key=lambda tile: -tile[1])
            self.chosen[queries] = torch.tensor(tiles, dtype=torch.int32, device=self.kv_len.device).view(-1, 2)
        return self.chosen[queries]
