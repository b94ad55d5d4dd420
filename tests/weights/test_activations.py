"""Activations of our own: those of torch, and of the same bits wherever a number stands."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from octavo.models.changes import become
from octavo.weights import cpu
from octavo.weights.activations import ExactActivation, native_function

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")

MODULES = {
    "silu": ACT2FN["silu"], "swish": nn.SiLU(), "gelu": ACT2FN["gelu"], "nn.GELU": nn.GELU(),
    "gelu_pytorch_tanh": ACT2FN["gelu_pytorch_tanh"], "nn.GELU tanh": nn.GELU("tanh"),
}  # fmt: skip


def ours(name: str) -> nn.Module:
    module = deepcopy(MODULES[name])
    become(module, ExactActivation, function=native_function(module))
    return module


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_function_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    """Over all magnitudes, infinities and NaN included; of any shape and stride."""
    x = torch.cat(
        [torch.linspace(-30, 30, 5003), torch.logspace(-30, 4, 50), torch.tensor([0.0, torch.inf, torch.nan])]
    )
    x = torch.cat([x, -x[5003:-2]]).to(dtype)
    expected = MODULES[name](x.double()).float()  # torch's GELU of float32 is NaN at infinity where there is AVX-512
    torch.testing.assert_close(
        ours(name)(x).float(), expected, equal_nan=True, atol=1e-6, rtol=max(2e-6, torch.finfo(dtype).eps)
    )
    wide = torch.randn(3, 5, 40)[..., ::2].to(dtype)
    found = ours(name)(wide)
    assert (found.shape, found.dtype) == (wide.shape, dtype)
    torch.testing.assert_close(found, MODULES[name](wide), atol=1e-6, rtol=max(2e-6, 2 * torch.finfo(dtype).eps))
    assert ours(name)(wide[:0]).shape == (0, 5, 20)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_number_s_bits_do_not_depend_on_its_place(name: str) -> None:
    """Alone, in any number of others, at any place, on one thread or three."""
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0)) * 3
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = ours(name)(x)
    finally:
        torch.set_num_threads(threads)
    for first in range(40):
        for count in (1, 3, 7, 8, 9, 17, 33):
            assert torch.equal(ours(name)(x[first : first + count]), together[first : first + count])
    assert torch.equal(ours(name)(x), together)


def test_other_modules_are_left_alone() -> None:
    assert native_function(nn.Linear(1, 1)) is None
    assert native_function(nn.ReLU()) is None
