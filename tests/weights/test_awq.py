"""Rounding in groups, and the two searches: each must lower the error that it is there for."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.weights.awq import Search, round_to_nearest, search_scale, search_shrink

GROUP = 32


def weight(out: int = 64, columns: int = 128) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def rows(outliers: float = 1.0, n: int = 256) -> Tensor:
    """Inputs, three channels of which are `outliers` times as large."""
    x = torch.randn(n, 128, generator=torch.Generator().manual_seed(1))
    x[:, [5, 40, 99]] *= outliers
    return x


def error(x: Tensor, weight: Tensor, scale: Tensor | float = 1.0, shrink: Tensor | float = 1.0) -> float:
    rounded = round_to_nearest(weight * scale, GROUP, shrink).dequantize() / scale
    return (x @ (rounded - weight).T).square().mean().item()


def test_rounding_is_within_half_a_step_of_every_group() -> None:
    w = weight()
    rounded = round_to_nearest(w, GROUP)
    assert rounded.codes.max() <= 15
    assert rounded.scales.dtype == torch.float16
    step = rounded.scales.float().repeat_interleave(GROUP, 1)
    # The range's ends may be half a step beyond the codes, since the zero is rounded too.
    assert ((rounded.dequantize() - w).abs() <= 1.01 * step).all()
    assert ((rounded.dequantize() - w).abs() <= 0.51 * step).float().mean() > 0.95


def test_groups_of_zeros_of_one_sign_and_of_one_value_are_kept() -> None:
    w = torch.zeros(8, 96)
    w[:, 32:64] = torch.linspace(0.5, 1.0, 32)  # a range that 0 widens
    w[:, 64:] = -0.25
    found = round_to_nearest(w, GROUP).dequantize()
    assert (found[:, :32] == 0).all()
    torch.testing.assert_close(found[:, 32:64], w[:, 32:64], atol=0.04, rtol=0)
    torch.testing.assert_close(found[:, 64:], w[:, 64:], atol=2e-4, rtol=0)


def test_channels_with_large_activations_are_scaled_up_and_the_error_falls() -> None:
    x, w = rows(outliers=30), weight()
    scale, alpha = search_scale([w[:32], w[32:]], x, x.abs().mean(0), GROUP)
    assert alpha > 0.2
    assert scale[[5, 40, 99]].min() > 3 * scale[:5].max()
    assert error(x, w, scale) < 0.5 * error(x, w)


def test_a_scale_is_searched_on_some_of_many_outputs() -> None:
    x, w = rows(outliers=30), weight()
    whole, _ = search_scale([w], x, x.abs().mean(0), GROUP)
    some, _ = search_scale([w], x, x.abs().mean(0), GROUP, Search(outputs=16))
    assert error(x, w, some) < 1.2 * error(x, w, whole)


def test_where_all_channels_are_alike_there_is_little_to_scale() -> None:
    x, w = rows(), weight()
    scale, _ = search_scale([w], x, x.abs().mean(0), GROUP)
    assert scale.max() / scale.min() < 1.5


def test_clipping_lowers_the_error_of_every_group_and_spares_what_matters() -> None:
    x, w = rows(), weight()
    w[:, 7] = 0.2  # the group's largest weight by far
    x[:, 7] = 0
    shrink = search_shrink(w, x, GROUP)
    assert shrink.shape == (64, 4)
    assert shrink[:, 0].mean() < 0.75, "nothing goes through the outlier: it should be clipped"
    assert error(x, w, shrink=shrink) < 0.8 * error(x, w)
    x[:, 7] = 10.0
    assert (search_shrink(w, x, GROUP)[:, 0] > 0.9).all(), "what goes through the outlier decides"
