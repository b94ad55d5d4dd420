"""Every layout against packers that are written from the formats' documentation, number by number."""

from __future__ import annotations

import pytest
import torch

from octavo.weights.layouts import Int4Weight, WeightLayout, pack_awq
from tests.weights.rounding import LAYOUTS, PACKED


def random_weight(out: int, columns: int, group: int, symmetric: bool = False) -> Int4Weight:
    generator = torch.Generator().manual_seed(out * columns + group)
    codes = torch.randint(16, (out, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(16, (out, columns // group), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(out, columns // group, generator=generator) * 0.1 + 0.01).half()
    return Int4Weight(codes, torch.full_like(zeros, 8) if symmetric else zeros, scales)


@pytest.mark.parametrize("shape", [(16, 64, 32), (8, 128, 128), (24, 96, 32)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_reads_what_the_format_describes_and_writes_awq_so(name: str, shape: tuple[int, int, int]):
    check(LAYOUTS[name], name, random_weight(*shape, symmetric="symmetric" in name))


@pytest.mark.parametrize("name", ["compressed", "compressed symmetric"])
def test_dimensions_that_are_no_eights_are_padded(name: str):
    check(LAYOUTS[name], name, random_weight(13, 20, 20, symmetric="symmetric" in name))


def check(layout: WeightLayout, name: str, weight: Int4Weight) -> None:
    expected = PACKED[name](weight)
    shapes = layout.shapes(*weight.codes.shape, weight.group_size)
    assert {key: tuple(tensor.shape) for key, tensor in expected.items()} == shapes
    for key, tensor in pack_awq(weight).items() if name == "awq" else ():
        assert torch.equal(tensor, expected[key])
        assert tensor.dtype == expected[key].dtype
        assert tensor.is_contiguous(), "safetensors takes no other"
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
