"""How checkpoints store the 4-bit weights of a linear layer, and the one form they are all read into.

A weight of [out, in] is `(code − zero) · scale`: codes and zeros are 0 … 15, and `group_size` columns of a row share a
zero and a scale. Eight 4-bit numbers make an int32, the first in its lowest bits. What differs is along which dimension
and in which order they are packed, and by how much zeros are shifted:

    AWQ (gemm)            qweight [in, out/8], qzeros [in/g, out/8], scales [in/g, out]; columns 0 2 4 6 1 3 5 7
    GPTQ                  qweight [in/8, out], qzeros [in/g, out/8], scales [in/g, out]; zeros less one, but in v2
    compressed-tensors    weight_packed [out, in/8], weight_scale [out, in/g], weight_shape [2], and where it is not
                          symmetric (zero 8) weight_zero_point [out/8, in/g]; dimensions padded to eights
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column of each 4-bit number of a word
_AWQ_PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # the number that holds each column
SYMMETRIC = 8  # the zero of weights stored without one


@dataclass(frozen=True)
class Int4Weight:
    """The weight of a linear layer in 4 bits, unpacked."""

    codes: Tensor  # uint8 [out, in], 0 … 15
    zeros: Tensor  # uint8 [out, in/group_size], 0 … 15
    scales: Tensor  # floating [out, in/group_size], in the checkpoint's own type
    order: Tensor | None = None  # int64 [in]: which input each column is of; None: in their own order

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def rows(self, chosen: Tensor | slice) -> Int4Weight:
        """Some of its outputs."""
        return Int4Weight(self.codes[chosen], self.zeros[chosen], self.scales[chosen], self.order)

    def sorted_by(self, groups: Tensor) -> Int4Weight:
        """The weight whose column i, as it lies here, belongs to group groups[i]: its columns group by group."""
        order = groups.argsort(stable=True)
        return Int4Weight(self.codes[:, order], self.zeros, self.scales, order)

    def dequantize(self) -> Tensor:
        """float32 [out, in], inputs in their own order."""
        groups = self.codes.float().unflatten(1, (-1, self.group_size))
        columns = ((groups - self.zeros.float()[..., None]) * self.scales.float()[..., None]).flatten(1)
        return columns if self.order is None else columns[:, self.order.argsort()]


@dataclass(frozen=True)
class WeightLayout:
    """One way of storing an Int4Weight as named tensors."""

    # (out, in, group_size) → the shape of each tensor by its name after the layer's
    shapes: Callable[[int, int, int], dict[str, tuple[int, ...]]]
    unpack: Callable[[Mapping[str, Tensor]], Int4Weight]  # tensors of those shapes
    multiple: tuple[int, int] = (1, 1)  # what out and in are multiples of


def _awq_shapes(out: int, columns: int, group: int) -> dict[str, tuple[int, ...]]:
    groups = columns // group
    return {"qweight": (columns, out // 8), "qzeros": (groups, out // 8), "scales": (groups, out)}


def _unpack_awq(tensors: Mapping[str, Tensor]) -> Int4Weight:
    codes, zeros = (_nibbles(tensors[name])[..., _AWQ_PLACE].flatten(1) for name in ("qweight", "qzeros"))
    return Int4Weight(_turned(codes), _turned(zeros), _turned(tensors["scales"]))


def pack_awq(weight: Int4Weight) -> dict[str, Tensor]:
    """The tensors of a weight in AWQ's form, which `octavo quantize` writes."""
    codes, zeros = (x.T.unflatten(1, (-1, 8))[..., _AWQ_ORDER] for x in (weight.codes, weight.zeros))
    return {"qweight": _words(codes), "qzeros": _words(zeros), "scales": _turned(weight.scales)}


def _gptq_shapes(out: int, columns: int, group: int) -> dict[str, tuple[int, ...]]:
    groups = columns // group
    return {"qweight": (columns // 8, out), "qzeros": (groups, out // 8), "scales": (groups, out)}


def _unpack_gptq(tensors: Mapping[str, Tensor], less: int) -> Int4Weight:
    codes = _nibbles(_turned(tensors["qweight"])).flatten(1)
    # Zero 0 less one is stored as 15: quantizers make no zero of 16.
    zeros = _nibbles(tensors["qzeros"]).flatten(1) + less & 15
    return Int4Weight(codes, _turned(zeros), _turned(tensors["scales"]))


def _compressed_shapes(out: int, columns: int, group: int, symmetric: bool) -> dict[str, tuple[int, ...]]:
    groups = columns // group
    shapes = {"weight_packed": (out, -(-columns // 8)), "weight_scale": (out, groups), "weight_shape": (2,)}
    return shapes if symmetric else shapes | {"weight_zero_point": (-(-out // 8), groups)}


def _unpack_compressed(tensors: Mapping[str, Tensor]) -> Int4Weight:
    out, columns = tensors["weight_shape"].tolist()
    scales, packed = tensors["weight_scale"], tensors.get("weight_zero_point")
    codes = _nibbles(tensors["weight_packed"]).flatten(1)[:, :columns].contiguous()
    if packed is None:
        return Int4Weight(codes, torch.full(scales.shape, SYMMETRIC, dtype=torch.uint8), scales)
    return Int4Weight(codes, _turned(_nibbles(_turned(packed)).flatten(1)[:, :out]), scales)


def _nibbles(words: Tensor) -> Tensor:
    """int32 [rows, n] → uint8 [rows, n, 8], lowest bits first."""
    bytes = words.contiguous().view(torch.uint8)
    return torch.stack((bytes & 15, bytes >> 4), dim=-1).flatten(1).unflatten(1, (-1, 8))


def _words(nibbles: Tensor) -> Tensor:
    """uint8 [rows, n, 8] → int32 [rows, n], lowest bits first."""
    pairs = nibbles.unflatten(2, (4, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).flatten(1).contiguous().view(torch.int32)


def _turned(x: Tensor) -> Tensor:
    return x.T.contiguous()


AWQ = WeightLayout(_awq_shapes, _unpack_awq, multiple=(8, 1))
GPTQ = WeightLayout(_gptq_shapes, partial(_unpack_gptq, less=1), multiple=(8, 8))
GPTQ_V2 = WeightLayout(_gptq_shapes, partial(_unpack_gptq, less=0), multiple=(8, 8))
COMPRESSED = WeightLayout(partial(_compressed_shapes, symmetric=False), _unpack_compressed)
COMPRESSED_SYMMETRIC = WeightLayout(partial(_compressed_shapes, symmetric=True), _unpack_compressed)
