"""What the kernels need to know of a step: small tensors on the device, built once, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.devices import send


@dataclass
class Step:
    """Index tensors are int32. A tile is (sequence, first of its new tokens) of so many new tokens.

    A step of decodes is made of the batch's own tensors by operations of the device: within a CUDA graph they are
    repeated with the lengths of each replay. Nothing else of it depends on more than the number of sequences.
    """

    q_start: Tensor  # [B + 1] rows of the step where each sequence begins
    kv_len: Tensor  # [B]
    q_lens: list[int]
    kv_lens: list[int]
    chosen: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> Step:
        if "cuda" not in batch.plan:
            batch.plan["cuda"] = cls(batch.q_start.int(), batch.kv_len.int(), batch.q_lens, batch.kv_lens)
        return batch.plan["cuda"]

    def tiles(self, queries: int) -> Tensor:
        """Tiles [n, 2] of `queries` new tokens that cover the sequences with more than one, those that read most
        first; or, with `queries` 1, the sequences with one."""
        if queries not in self.chosen:
            self.chosen[queries] = self._decodes(queries) if max(self.q_lens) == 1 else self._listed(queries)
        return self.chosen[queries]

    def _decodes(self, queries: int) -> Tensor:
        """Where every sequence has one."""
        n = len(self.q_lens) if queries == 1 else 0
        sequences = torch.arange(n, dtype=torch.int32, device=self.kv_len.device)
        return torch.stack([sequences, torch.zeros_like(sequences)], 1)

    def _listed(self, queries: int) -> Tensor:
        wanted = [(i, n) for i, n in enumerate(self.q_lens) if (n == 1) == (queries == 1)]
        tiles = [(i, first) for i, n in wanted for first in range(0, n, queries)]
        past = [kv_len - n for kv_len, n in zip(self.kv_lens, self.q_lens, strict=True)]
        tiles.sort(key=lambda tile: -past[tile[0]] - tile[1])
        return send(torch.tensor(tiles, dtype=torch.int32).view(-1, 2), self.kv_len.device)
