"""Packed linear layers against the float64 product with the weights they stand for, by every kernel there is."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.errors import Unsupported
from octavo.weights import cpu
from octavo.weights.layouts import Int4Weight
from octavo.weights.linear import MANY, PackedLinear

# out: below, at and beyond tiles of 16; in: groups of 16 to 128, whole rows, and rows that need padding
SHAPES = [(64, 256, 128), (37, 96, 32), (5, 100, 100), (48, 192, 96), (129, 64, 64), (16, 272, 16), (1, 344, 344)]
ROWS = [1, 2, 3, 5, 8, 9, 21]
# Activations have 15 bits of their group's largest value; then the answer is rounded.
TOLERANCE = {torch.float32: 3e-4, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_weight(out: int, columns: int, group: int, dtype: torch.dtype = torch.float16) -> Int4Weight:
    generator = torch.Generator().manual_seed(out + columns)
    codes = torch.randint(16, (out, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(16, (out, columns // group), dtype=torch.uint8, generator=generator)
    scales = torch.rand(out, columns // group, generator=generator) * 0.02 + 0.01
    return Int4Weight(codes, zeros, scales.to(dtype))


def layer_of(weight: Int4Weight, dtype: torch.dtype, bias: bool = True) -> PackedLinear:
    out, columns = weight.codes.shape
    layer = PackedLinear(columns, out, bias, dtype)
    if layer.bias is not None:
        layer.bias.data = torch.linspace(-1, 1, out).to(dtype)
    layer.fill(weight)
    return layer


def exact(layer: PackedLinear, weight: Int4Weight, x: Tensor) -> Tensor:
    product = x.double() @ weight.dequantize().double().T
    return product if layer.bias is None else product + layer.bias.double()


def size(weight: Int4Weight, x: Tensor) -> Tensor:
    """How large the products of x's rows are, whatever their signs: [rows, out]."""
    return (x.double() ** 2 @ weight.dequantize().double().T ** 2).sqrt()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_multiply(isa: str, shape: tuple[int, int, int], dtype: torch.dtype):
    scale = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32 if shape[2] == 64 else torch.float16
    weight = random_weight(*shape, dtype=scale)
    layer = layer_of(weight, dtype)
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).to(dtype)
        expected = exact(layer, weight, x)
        bound = TOLERANCE[dtype] * (size(weight, x) + expected.abs())
        assert ((layer(x) - expected).abs() < bound).all(), (isa, rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_loses_nothing(isa: str, shape: tuple[int, int, int]):
    weight = random_weight(*shape)
    layer = layer_of(weight, torch.float32)
    assert torch.equal(layer.decode(0, shape[0], torch.float32), weight.dequantize())
    assert torch.equal(layer.decode(0, shape[0], torch.float16), weight.dequantize().half()), isa
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.weights.cpu.refuses", lambda _: "not built")
        assert torch.equal(layer.decode(0, shape[0], torch.float32), weight.dequantize())


def test_a_row_is_answered_alike_however_many_go_with_it(isa: str):
    layer = layer_of(random_weight(40, 256, 64), torch.bfloat16)
    x = torch.randn(19, 256).bfloat16()
    alone = torch.cat([layer(row) for row in x.split(1)])
    assert torch.equal(layer(x), alone), isa


def test_an_input_far_above_its_neighbours_leaves_them_their_share(isa: str):
    weight = random_weight(64, 256, 128)
    layer = layer_of(weight, torch.bfloat16, bias=False)
    x = torch.randn(4, 256).bfloat16()
    x[:, 3] = 1000
    expected = exact(layer, weight, x)
    others = size(weight, x.clamp(-4, 4))
    assert ((layer(x) - expected).abs() < 2**-8 * expected.abs() + 0.1 * others).all(), isa


def test_many_rows_are_left_to_a_matrix_unit(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "has_tiles", lambda: True)
    monkeypatch.setattr("octavo.weights.linear.SLICE", 16 * 100)
    weight = random_weight(37, 96, 32)
    layer = layer_of(weight, torch.bfloat16)
    x = torch.randn(MANY, 96).bfloat16()
    monkeypatch.setattr(cpu, "multiply", None)
    expected = exact(layer, weight, x)
    assert ((layer(x) - expected).abs() < 1e-2 * (size(weight, x) + expected.abs())).all(), isa


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(isa: str, wrong: float):
    layer = layer_of(random_weight(16, 64, 32), torch.float32)
    x = torch.randn(2, 64)
    x[1, 40] = wrong
    y = layer(x)
    assert y[0].isfinite().all(), isa
    assert not y[1].isfinite().any()


def test_shapes_strides_and_zeros(isa: str):
    weight = random_weight(24, 64, 32)
    layer = layer_of(weight, torch.float32)
    x = torch.randn(2, 3, 128)[..., ::2]
    assert layer(x).shape == (2, 3, 24)
    assert torch.allclose(layer(x), exact(layer, weight, x.reshape(-1, 64)).float().view(2, 3, 24), atol=1e-3)
    assert layer(torch.empty(0, 64)).shape == (0, 24)
    assert torch.equal(layer(torch.zeros(1, 64))[0], layer.bias), isa
    assert torch.equal(layer(torch.full((1, 64), 1e-40))[0], layer.bias)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_torch_multiplies_a_slice_at_a_time(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("octavo.weights.cpu.refuses", lambda _: "not built")
    monkeypatch.setattr("octavo.weights.linear.SLICE", 32 * shape[1])
    weight = random_weight(*shape)
    layer = layer_of(weight, torch.float32)
    x = torch.randn(9, shape[1])
    assert torch.allclose(layer(x).double(), exact(layer, weight, x), rtol=1e-4, atol=1e-4)


def test_without_the_extension_it_is_said_once():
    code = (
        "import sys, warnings; sys.modules['octavo.weights._native'] = None; import torch\n"
        "from octavo.weights.linear import PackedLinear\n"
        "from octavo.weights.layouts import Int4Weight\n"
        "layer = PackedLinear(16, 8, False); one = torch.ones(8, 16, dtype=torch.uint8)\n"
        "layer.fill(Int4Weight(one, one[:, :1] * 0, torch.ones(8, 1)))\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    print([layer(torch.ones(1, 16))[0, 0].item() for _ in range(2)])\n"
        "print(len(seen), seen[0].message)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[16.0, 16.0]\n1 4-bit weights are multiplied without the native kernels and slower:")


def test_one_packed_copy_of_little_more_than_a_quarter_of_16_bits():
    weight = random_weight(256, 1024, 128)
    layer = layer_of(weight, torch.bfloat16, bias=False)
    held = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
    assert held == layer.nbytes <= 0.27 * 2 * weight.codes.numel()


def test_groups_that_the_tiles_do_not_have_are_refused():
    with pytest.raises(Unsupported, match="groups of 24"):
        layer_of(random_weight(16, 48, 24), torch.float32)


def test_a_layer_that_was_moved_copied_or_stored_multiplies_what_it_holds(isa: str):
    weight = random_weight(40, 256, 64, dtype=torch.float32)
    layer = layer_of(weight, torch.float32)
    x = torch.randn(3, 256)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected), isa
    layer.to(torch.bfloat16)  # new scales, the same codes
    junk = torch.full_like(layer.scales, torch.nan, dtype=torch.float32)  # where the old scales were, perhaps
    moved = layer_of(Int4Weight(weight.codes, weight.zeros, weight.scales.bfloat16()), torch.bfloat16)
    assert torch.equal(layer(x.bfloat16()), moved(x.bfloat16())), isa
    assert junk.isnan().all()
