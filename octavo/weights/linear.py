"""A linear layer whose weight stays in 4 bits: one packed copy in memory, and never a 16-bit one.

On a CPU the native kernels multiply packed weights. On a GPU, without the extension, and for many rows where torch has
a matrix unit (AMX), a slice of the outputs at a time is decoded to the activations' type and multiplied by torch.
torch's own int4 operators are not used, on a GPU neither.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.devices import HOST
from octavo.errors import Unsupported, warn_once
from octavo.weights import cpu
from octavo.weights.layouts import Int4Weight

TILE = 16  # outputs that lie together: the kernels see that it is theirs
SLICE = 1 << 22  # weights decoded at a time
MANY = 256  # rows of bf16 that an AMX unit makes up for the decoding with; AVX-512 does not up to 2048 (weights_cpu.py)


class PackedLinear(nn.Module):
    """`nn.Linear` for an Int4Weight. Empty until `fill`, so that it can be built before weights are read.

    In tiles of 16 outputs, zeros and scales for every `group` (16 … 128) inputs; the last tile and the last group of
    a row may be padded:

        codes   uint8 [tiles, in/8, 16, 4]   byte j: input j of the eight in the low half, j + 4 in the high half
        scales  [tiles, in/group, 16]        in the checkpoint's type
        zeros   uint8 [tiles, in/group, 16]
    """

    exact = False  # whether a row's bits must not depend on how many there are

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.codes: Tensor
        self.scales: Tensor
        self.zeros: Tensor
        self.order: Tensor | None  # [in] which input each column is of; None: in their own order
        for name in ("codes", "scales", "zeros", "order"):
            self.register_buffer(name, None, persistent=False)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return 8 * self.codes.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Of the packed weight."""
        order = 0 if self.order is None else self.order.nbytes
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes + order

    def fill(self, weight: Int4Weight) -> None:
        """Take a weight, packed anew. Raises Unsupported for a group size that the tiles do not have."""
        group = math.gcd(weight.group_size, 128)
        codes, zeros, scales = weight.codes, weight.zeros, weight.scales
        self.order = weight.order
        if group < TILE:
            if scales.shape[1] > 1:
                raise Unsupported(f"groups of {weight.group_size} weights are not supported: only multiples of 16 are")
            codes, group = F.pad(codes, (0, -codes.shape[1] % TILE)), TILE
        repeat = codes.shape[1] // group // scales.shape[1]
        tiles = _tiled(codes).unflatten(2, (-1, 2, 4)).transpose(1, 2)  # [tiles, in/8, 16, 2, 4]
        self.codes = (tiles[..., 0, :] | tiles[..., 1, :] << 4).contiguous()
        self.zeros, self.scales = (
            _tiled(x.repeat_interleave(repeat, dim=1)).transpose(1, 2).contiguous() for x in (zeros, scales)
        )

    def decode(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows of the weight as numbers: [end − first, in], columns as they lie; `first` is a multiple of 16."""
        if _by_kernels(self.codes.device):
            whole = torch.empty(end - first, 8 * self.codes.shape[1], dtype=dtype)
            return cpu.decode(self._matrix(), first, whole)[:, : self.in_features]
        tiles = slice(first // TILE, -(-end // TILE))
        packed = self.codes[tiles]
        codes = torch.stack((packed & 15, packed >> 4), dim=3).transpose(1, 2).flatten(2)
        zeros, scales = (x[tiles].transpose(1, 2).float()[..., None] for x in (self.zeros, self.scales))
        rows = ((codes.unflatten(2, (-1, self.group)) - zeros) * scales).to(dtype).flatten(2).flatten(0, 1)
        return rows[: end - first, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] of x's type."""
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows[:, self.order]
        sliced = not self.exact and len(rows) >= MANY and x.dtype == torch.bfloat16 and cpu.has_tiles()
        packed = not sliced and _by_kernels(x.device)
        return (self._packed(rows) if packed else self._sliced(rows)).unflatten(0, x.shape[:-1])

    def _packed(self, x: Tensor) -> Tensor:
        if 8 * self.codes.shape[1] != self.in_features:
            x = F.pad(x, (0, 8 * self.codes.shape[1] - self.in_features))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return cpu.multiply(self._matrix(), x, bias)

    def _matrix(self) -> cpu.Matrix:
        """The kernels' view of the weight: addresses, so it is not kept, for tensors move."""
        return cpu.matrix(self.codes, self.scales, self.zeros, self.out_features)

    def _sliced(self, x: Tensor) -> Tensor:
        step = max(TILE, SLICE // self.in_features // TILE * TILE)
        y = x.new_empty(len(x), self.out_features)
        for first in range(0, self.out_features, step):
            end = min(first + step, self.out_features)
            bias = None if self.bias is None else self.bias[first:end].to(x.dtype)
            y[:, first:end] = F.linear(x, self.decode(first, end, x.dtype), bias)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, 4 bits"


def _tiled(x: Tensor) -> Tensor:
    """[out, n] → [tiles, 16, n], padded with zeros."""
    return F.pad(x, (0, 0, 0, -len(x) % TILE)).unflatten(0, (-1, TILE))


def _by_kernels(device: torch.device) -> bool:
    """Whether the native kernels multiply what is there."""
    why = cpu.refuses(device)
    if why is not None and device == HOST:
        warn_once(f"4-bit weights are multiplied without the native kernels and slower: {why}")
    return why is None
