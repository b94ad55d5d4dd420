"""Streaming statistics against numpy over all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.quant.statistics import QUANTILE_ROWS, QUANTILES, Statistics

Array = NDArray[np.floating]


def windows(*lengths: int, heads: int = 2, dim: int = 6, seed: int = 0) -> list[Array]:
    """Windows of rows [tokens, heads, dim] whose channels differ in place and width."""
    generator = np.random.default_rng(seed)
    place, width = generator.standard_normal((2, heads, dim)) * np.array([20, 1])[:, None, None]
    return [(generator.standard_normal((n, heads, dim)) * width + place).astype(np.float32) for n in lengths]


def accumulated(parts: list[Array]) -> Statistics:
    statistics = Statistics(*parts[0].shape[1:])
    for part in parts:
        statistics.update(torch.from_numpy(part))
    return statistics


def held(statistics: Statistics) -> list[Tensor]:
    return [value for value in vars(statistics).values() if isinstance(value, Tensor)]


def test_streaming_equals_numpy_over_all_rows() -> None:
    parts = windows(100, 1, 37, 256, 300)
    x = np.concatenate(parts).astype(np.float64)
    summary = accumulated(parts).summary()
    np.testing.assert_array_equal(summary["min"].numpy(), x.min(0).astype(np.float32))
    np.testing.assert_array_equal(summary["max"].numpy(), x.max(0).astype(np.float32))
    np.testing.assert_array_equal(summary["absmax"].numpy(), np.abs(x).max(0).astype(np.float32))
    np.testing.assert_allclose(summary["mean"].numpy(), x.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(summary["std"].numpy(), x.std(0), rtol=1e-5, atol=1e-6)


def test_the_way_rows_are_cut_into_windows_does_not_matter() -> None:
    (x,) = windows(300)
    whole, cut = accumulated([x]).summary(), accumulated([x[:1], x[1:50], x[50:299], x[299:]]).summary()
    for name in ("min", "max", "absmax"):
        assert torch.equal(whole[name], cut[name])
    for name in ("mean", "std"):
        torch.testing.assert_close(whole[name], cut[name], rtol=1e-6, atol=1e-6)


def test_quantiles_are_the_mean_of_the_windows_own() -> None:
    parts = windows(QUANTILE_ROWS, 10, 100)
    summary = accumulated(parts).summary()
    for name, q in {"q01": 0.01, "q50": 0.5, "q99": 0.99}.items():
        expected = np.mean([np.quantile(part.astype(np.float64), q, axis=0) for part in parts], axis=0)
        np.testing.assert_allclose(summary[name].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_quantiles_of_a_long_window_are_taken_over_evenly_spaced_rows() -> None:
    (x,) = windows(QUANTILE_ROWS * 3 + 5)
    expected = np.quantile(x[::4].astype(np.float64), 0.5, axis=0)
    np.testing.assert_allclose(accumulated([x]).summary()["q50"].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_extremes_are_found_in_every_row_of_a_long_window() -> None:
    (x,) = windows(QUANTILE_ROWS * 4)
    for row in (1, 2, 3, 1022, 1023):  # rows that thinning leaves out
        spiked = x.copy()
        spiked[row] = 1000
        assert (accumulated([spiked]).summary()["max"] == 1000).all()
        assert (accumulated([-spiked]).summary()["min"] == -1000).all()


def test_sums_keep_their_precision_far_from_zero() -> None:
    parts = [(np.random.default_rng(i).standard_normal((2000, 1, 2)) + 3000).astype(np.float32) for i in range(20)]
    x = np.concatenate(parts).astype(np.float64)
    summary = accumulated(parts).summary()
    np.testing.assert_allclose(summary["mean"].numpy(), x.mean(0), rtol=1e-7)
    np.testing.assert_allclose(summary["std"].numpy(), x.std(0), rtol=1e-5)


def test_memory_does_not_grow_with_updates() -> None:
    statistics = accumulated(windows(5))
    names, nbytes = set(vars(statistics)), sum(t.untyped_storage().nbytes() for t in held(statistics))
    assert nbytes > 0
    for part in windows(1000, 3, 400, 2000):
        statistics.update(torch.from_numpy(part))
    assert set(vars(statistics)) == names
    assert sum(t.untyped_storage().nbytes() for t in held(statistics)) == nbytes
    assert all(isinstance(value, Tensor | int) for value in vars(statistics).values())


def test_rows_and_windows_are_counted() -> None:
    statistics = accumulated(windows(100, 1, 37))
    assert (statistics.rows, statistics.windows) == (138, 3)


def test_a_summary_is_float32_per_head_and_channel_and_at_most_sixteen_numbers() -> None:
    summary = accumulated(windows(10, heads=3, dim=5)).summary()
    assert {"min", "max", "mean", "absmax", *QUANTILES} <= summary.keys()
    assert len(summary) <= 16
    for tensor in summary.values():
        assert tensor.dtype == torch.float32
        assert tensor.shape == (3, 5)


def test_a_constant_channel_has_no_spread() -> None:
    x = np.full((500, 1, 2), 0.1, dtype=np.float32)
    summary = accumulated([x]).summary()
    assert summary["min"].tolist() == summary["max"].tolist() == x[0].tolist()
    assert (summary["std"] < 1e-5).all()
    assert torch.isfinite(summary["std"]).all()


def test_a_summary_is_not_changed_by_later_updates() -> None:
    first, second = windows(10, 10)
    statistics = accumulated([first])
    summary = statistics.summary()
    before = {name: tensor.clone() for name, tensor in summary.items()}
    statistics.update(torch.from_numpy(second * 100))
    assert all(torch.equal(tensor, before[name]) for name, tensor in summary.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_float_dtype_are_taken_at_their_float32_value(dtype: torch.dtype) -> None:
    (x,) = windows(50)
    rows = torch.from_numpy(x).to(dtype)
    statistics = Statistics(2, 6)
    statistics.update(rows.requires_grad_())
    summary, expected = statistics.summary(), accumulated([rows.detach().float().numpy()]).summary()
    for name, tensor in summary.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
        assert not tensor.requires_grad
