"""Products with weights in panels: right, and of the same bits whatever is multiplied together and by which threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from octavo.weights import cpu
from octavo.weights.panels import PanelEmbedding, PanelLinear, unpacked

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")

pairs = pytest.mark.skipif(not cpu.multiplies_pairs(), reason="this processor does not multiply pairs of bf16 numbers")
SHAPES = [(1, 1), (16, 8), (40, 96), (33, 1100), (7, 513), (130, 1537)]  # out, in
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(out: int, columns: int, dtype: torch.dtype, rows: int = 450) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out * columns)
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((out, columns), (rows, columns), (out,)))
    return weight.to(dtype), x, bias


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_numbers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Against float64, for activations of every type, with and without a bias."""
    weight, x, bias = draw(*shape, dtype)
    panels = cpu.pack_panels(weight)
    for kind in TYPES:
        for rows in (1, 5, 13, 450):
            own, shift = x[:rows].to(kind), bias.to(kind)
            for b in (None, shift):
                exact = own.double() @ weight.double().T + (0 if b is None else b.double())
                found = cpu.multiply_panels(panels, len(weight), own, b)
                assert found.dtype == kind
                close = 2 * torch.finfo(kind).eps * exact.abs() + 1e-5 * shape[1] ** 0.5
                assert ((found.double() - exact).abs() <= close).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_s_bits_do_not_depend_on_its_company(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """1 … 70 rows from anywhere, hundreds, strided ones, and one thread or three: the bits of a row computed alone."""
    weight, x, bias = draw(*shape, dtype)
    panels, out = cpu.pack_panels(weight), len(weight)
    alone = torch.cat([cpu.multiply_panels(panels, out, row[None], bias) for row in x])
    for rows in [*range(1, 71), 191, 192, 193, 385]:
        for first in (0, 450 - rows):
            some = slice(first, first + rows)
            assert torch.equal(cpu.multiply_panels(panels, out, x[some], bias), alone[some]), rows
    assert torch.equal(cpu.multiply_panels(panels, out, x[::3], bias), alone[::3])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (1, 9, 40, 450):
                assert torch.equal(cpu.multiply_panels(panels, out, x[:rows], bias), alone[:rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


@pairs
@pytest.mark.parametrize("shape", [(1, 2), (16, 8), (40, 96), (33, 1100), (7, 1026), (130, 3074)], ids=str)
def test_pairs_are_products_of_rows_rounded_to_bf16(shape: tuple[int, int]) -> None:
    """Of rows of every type, alone the same bits as among others."""
    weight, x, bias = draw(*shape, torch.bfloat16)
    panels, out = cpu.pack_panels(weight, pairs=True), len(weight)
    assert torch.equal(unpacked(panels, out), weight)
    assert panels.nbytes == -(-out // 16) * 16 * shape[1] * 2
    for kind in TYPES:
        own, shift = x.to(kind), bias.to(kind)
        exact = own.bfloat16().double() @ weight.double().T + shift.double()
        alone = torch.cat([cpu.multiply_panels(panels, out, row[None], shift) for row in own])
        assert (
            (alone.double() - exact).abs() <= 2 * torch.finfo(kind).eps * exact.abs() + 1e-5 * shape[1] ** 0.5
        ).all()
        for rows in [*range(2, 30), 191, 193, 450]:
            assert torch.equal(cpu.multiply_panels(panels, out, own[:rows], shift), alone[:rows]), rows


@pairs
def test_modules_multiply_and_look_up_pairs() -> None:
    check_modules(pairs=True)


def test_every_instruction_set_that_fuses_has_the_same_bits() -> None:
    """Sums are defined by their order and not by registers: all x86 sets but the portable one agree."""
    fused = [isa for isa in cpu.extension.isas if isa != "portable"]
    if len(fused) < 2:
        pytest.skip("this processor has one such set")
    weight, x, bias = draw(130, 1537, torch.bfloat16)
    panels, found = cpu.pack_panels(weight), []
    for name in fused:
        with cpu.extension.limited_to(name):
            found.append(cpu.multiply_panels(panels, len(weight), x, bias))
    assert all(torch.equal(one, found[0]) for one in found)


def test_what_is_not_finite_stays_in_its_row() -> None:
    """Padding of a panel and of a group of rows mixes nothing into what is kept."""
    weight, x, _ = draw(33, 100, torch.bfloat16, rows=40)
    panels = cpu.pack_panels(weight)
    clean = cpu.multiply_panels(panels, 33, x, None)
    x[7], x[20, 3] = torch.nan, torch.inf
    found = cpu.multiply_panels(panels, 33, x, None)
    others = [row for row in range(40) if row not in (7, 20)]
    assert found[7].isnan().all()
    assert not found[20].isfinite().any()
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_panels_hold_the_weight_and_nothing_more(dtype: torch.dtype) -> None:
    """Packed and unpacked a weight has its bits, and no more bytes but those that pad its last panel."""
    weight, _, _ = draw(40, 96, dtype)
    panels = cpu.pack_panels(weight)
    assert torch.equal(unpacked(panels, 40), weight)
    assert panels.nbytes == 48 * 96 * dtype.itemsize
    assert torch.equal(cpu.pack_panels(weight.T.contiguous().T), panels)


def test_modules_multiply_and_look_up() -> None:
    check_modules(pairs=False)


def check_modules(pairs: bool) -> None:
    """The linear layer and the embedding of one weight in panels, for any leading dimensions, also none and empty."""
    weight, x, bias = draw(40, 96, torch.bfloat16)
    x = x.bfloat16().float()
    linear, table = nn.Linear(96, 40), nn.Embedding(40, 96)
    linear.bias = nn.Parameter(bias)
    linear.weight = table.weight = nn.Parameter(cpu.pack_panels(weight, pairs), requires_grad=False)
    linear.__class__, table.__class__ = PanelLinear, PanelEmbedding
    with torch.inference_mode():
        for given in (x[0], x[:7], x[:6].view(1, 2, 3, 96), x[:0]):
            expected = nn.functional.linear(given, weight.float(), bias)
            torch.testing.assert_close(linear(given), expected)
        ids = torch.tensor([[39, 0, 17]])
        assert torch.equal(table(ids), weight[ids])
        table.leaves_as = torch.float32
        assert torch.equal(table(ids), weight[ids].float())


def test_what_lies_beyond_a_tensor_is_refused() -> None:
    weight, x, bias = draw(40, 32, torch.float32)
    panels = cpu.pack_panels(weight)
    gate, narrow = (panels, 40, None), (panels[:, :16].contiguous(), 40, None)
    wrong = [
        lambda: cpu.multiply_panels(panels, 49, x, None),
        lambda: cpu.multiply_panels(panels, 40, x[:, :-1], None),
        lambda: cpu.multiply_panels(panels, 40, x, bias[:39]),
        lambda: cpu.multiply_panels(panels, 40, x.bfloat16(), bias),
        lambda: cpu.multiply_together([gate, narrow], x),
        lambda: cpu.multiply_gated(gate, (panels, 39, None), x),
        lambda: cpu.rms_norm(x, torch.ones(31), 1e-5),
        lambda: cpu.silu_gate_(x.clone(), x[:-1]),
        lambda: cpu.rope(x[:, None], x[:, :-1], x),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="the native kernels expect"):
            call()
