"""Every layout against packers written here from the formats' documentation, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.weights.layouts import AWQ, COMPRESSED, COMPRESSED_SYMMETRIC, GPTQ, GPTQ_V2, Int4Weight, WeightLayout

LAYOUTS = {
    "awq": AWQ,
    "gptq": GPTQ,
    "gptq_v2": GPTQ_V2,
    "compressed": COMPRESSED,
    "compressed symmetric": COMPRESSED_SYMMETRIC,
}


def random_weight(out: int, columns: int, group: int, symmetric: bool = False) -> Int4Weight:
    generator = torch.Generator().manual_seed(out * columns + group)
    codes = torch.randint(16, (out, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(16, (out, columns // group), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(out, columns // group, generator=generator) * 0.1 + 0.01).half()
    return Int4Weight(codes, torch.full_like(zeros, 8) if symmetric else zeros, scales)


def words(rows: list[list[int]]) -> torch.Tensor:
    """Lists of eights of 4-bit numbers as int32, first number lowest."""
    numbers = [
        [sum(n << 4 * i for i, n in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)] for row in rows
    ]
    return torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.int32))


def padded(row: list[int]) -> list[int]:
    return row + [0] * (-len(row) % 8)


def awq(weight: Int4Weight) -> dict[str, torch.Tensor]:
    """AutoAWQ, gemm: words along out, interleaved."""

    def interleaved(row: list[int]) -> list[int]:
        return [row[at + place] for at in range(0, len(row), 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]

    return {
        "qweight": words([interleaved(row) for row in weight.codes.T.tolist()]),
        "qzeros": words([interleaved(row) for row in weight.zeros.T.tolist()]),
        "scales": weight.scales.T,
    }


def gptq(weight: Int4Weight, less: int) -> dict[str, torch.Tensor]:
    """GPTQ: codes in words along in, zeros along out; version 1 stores a zero less one."""
    return {
        "qweight": words(weight.codes.tolist()).T,
        "qzeros": words([[(zero - less) % 16 for zero in row] for row in weight.zeros.T.tolist()]),
        "scales": weight.scales.T,
    }


def compressed(weight: Int4Weight, symmetric: bool) -> dict[str, torch.Tensor]:
    """compressed-tensors pack-quantized: signed numbers −8 … 7 stored as number + 8."""
    signed = weight.codes.int() - 8
    tensors = {
        "weight_packed": words([padded([n + 8 for n in row]) for row in signed.tolist()]),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words([padded(row) for row in weight.zeros.T.tolist()]).T
    return tensors


REFERENCES = {
    "awq": awq,
    "gptq": lambda weight: gptq(weight, 1),
    "gptq_v2": lambda weight: gptq(weight, 0),
    "compressed": lambda weight: compressed(weight, False),
    "compressed symmetric": lambda weight: compressed(weight, True),
}


@pytest.mark.parametrize("shape", [(16, 64, 32), (8, 128, 128), (24, 96, 32)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_reads_and_writes_what_the_format_describes(name: str, shape: tuple[int, int, int]):
    check(LAYOUTS[name], name, random_weight(*shape, symmetric="symmetric" in name))


@pytest.mark.parametrize("name", ["compressed", "compressed symmetric"])
def test_dimensions_that_are_no_eights_are_padded(name: str):
    check(LAYOUTS[name], name, random_weight(13, 20, 20, symmetric="symmetric" in name))


def check(layout: WeightLayout, name: str, weight: Int4Weight) -> None:
    expected = REFERENCES[name](weight)
    packed = layout.pack(weight)
    shapes = layout.shapes(*weight.codes.shape, weight.group_size)
    assert packed.keys() == expected.keys() == shapes.keys()
    for key, tensor in packed.items():
        assert torch.equal(tensor, expected[key])
        assert tensor.dtype == expected[key].dtype
        assert tensor.is_contiguous(), "safetensors takes no other"
        assert tuple(tensor.shape) == shapes[key]
    read = layout.unpack(expected)
    for field in ("codes", "zeros", "scales"):
        assert torch.equal(getattr(read, field), getattr(weight, field)), field
        assert getattr(read, field).is_contiguous()


def test_a_weight_is_its_code_less_the_zero_times_the_scale():
    weight = Int4Weight(
        torch.tensor([[0, 15, 7, 8]], dtype=torch.uint8),
        torch.tensor([[3, 8]], dtype=torch.uint8),
        torch.tensor([[0.5, 2.0]]),
    )
    assert weight.group_size == 2
    assert weight.dequantize().tolist() == [[-1.5, 6.0, -2.0, 0.0]]
