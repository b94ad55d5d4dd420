"""Sums that do not tell in which order, or in which groups, their terms were added."""

from __future__ import annotations

import torch
from torch import Tensor


class Sum:
    """A sum of tensors in two float64 numbers, the second of what rounding takes from the first (Knuth's TwoSum).

    It is good to about 106 bits. Shards of a calibration that were added up elsewhere, and then together, come to the
    float64 numbers of one run; plain sums would differ in their last bits.
    """

    def __init__(self, *shape: int):
        self.high, self.low = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        x = x.double()
        total = self.high + x
        part = total - self.high
        self.low += (self.high - (total - part)) + (x - part)
        self.high = total

    def merge(self, other: Sum) -> None:
        self.add(other.high)
        self.low += other.low

    @property
    def value(self) -> Tensor:
        return self.high + self.low
