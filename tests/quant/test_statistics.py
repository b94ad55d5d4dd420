"""Streaming statistics against numpy over all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.quant.codec import decode, encode
from octavo.quant.format import CODECS
from octavo.quant.statistics import (
    QUANTILE_ROWS,
    QUANTILES,
    LayerStatistics,
    Statistics,
    Sum,
    attention_static,
)

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
    """All tensors of it, those of its sums included."""
    values = [
        part
        for value in vars(statistics).values()
        for part in (vars(value).values() if isinstance(value, Sum) else (value,))
    ]
    return [value for value in values if isinstance(value, Tensor)]


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


def test_rows_that_are_skipped_reach_the_range_and_not_the_mean_and_std() -> None:
    (x,) = windows(300)
    rest = accumulated([x[64:]]).summary()
    sinks = torch.from_numpy(x.copy())
    sinks[:64] *= 100
    statistics = Statistics(2, 6)
    statistics.update(sinks, skip=64)
    summary = statistics.summary()
    assert (summary["absmax"] > 10 * rest["absmax"]).all()
    for name in ("mean", "std"):
        torch.testing.assert_close(summary[name], rest[name], rtol=1e-6, atol=1e-6)


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
    assert all(isinstance(value, Tensor | Sum | int) for value in vars(statistics).values())


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


def observed(k: Tensor, v: Tensor, q: Tensor, norms: Tensor) -> dict[str, dict[str, Tensor]]:
    layer = LayerStatistics(k.shape[1], k.shape[2], v.shape[2])
    layer.update(k, v)
    layer.read_by(q)
    layer.projected_by(norms)
    return layer.summary()


def test_a_key_channels_reader_is_the_root_mean_square_of_the_queries_that_read_its_head() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(200, heads, 4, generator=generator) for heads in (2, 2, 6))
    norms = torch.rand(6, 4, generator=generator)
    sides = observed(k, v, q, norms)
    for head in range(2):
        of_head = q[:, 3 * head : 3 * head + 3]
        torch.testing.assert_close(sides["k"]["reader"][head], of_head.square().mean((0, 1)).sqrt())
        torch.testing.assert_close(sides["v"]["reader"][head], norms[3 * head : 3 * head + 3].square().sum(0).sqrt())


def test_what_another_layer_reads_of_a_shared_cache_is_added_to_its_readers() -> None:
    layer = LayerStatistics(1, 2, 2)
    for rows in (torch.ones(100, 1, 2), 3 * torch.ones(100, 1, 2)):
        layer.read_by(rows)
        layer.projected_by(rows[0])
    layer.update(torch.randn(100, 1, 2), torch.randn(100, 1, 2))
    sides = layer.summary()
    torch.testing.assert_close(sides["k"]["reader"], torch.full((1, 2), 5.0**0.5))
    torch.testing.assert_close(sides["v"]["reader"], torch.full((1, 2), 10.0**0.5))


@pytest.mark.parametrize("codec", ["int8-token", "int4-token"])
def test_scores_are_nearest_with_the_static_part_that_weighs_channels_by_their_queries(codec: str) -> None:
    """Keys and queries whose channels differ by factors of hundreds, as on real models: the error of scores is smaller
    than with the keys' own deviations as c, and than with no c at all."""
    generator = torch.Generator().manual_seed(1)
    width, strength = (10 ** (2 * torch.rand(64, generator=generator) - 1) for _ in range(2))
    k = torch.randn(2000, 1, 64, generator=generator) * width + 5
    q = torch.randn(500, 64, generator=generator) * strength

    def error(reader: Tensor, std: Tensor) -> float:
        static = attention_static(k.mean(0), std, reader)
        stored = decode(encode(k, CODECS[codec], static), CODECS[codec], 64, static)
        return ((stored - k)[:, 0] @ q.T).square().mean().sqrt().item()

    std, reader = k.std(0), q.square().mean(0).sqrt()[None]
    best = error(reader, std)
    assert best < 0.8 * error(1 / std, std), "c = std"
    assert best < 0.8 * error(std, std), "c = 1"


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_coded_rows_have_unit_variance_whatever_the_rows_and_the_readers_are_scaled_by(scale: float) -> None:
    x = torch.randn(1000, 2, 8) * torch.arange(1, 9) * scale
    static = attention_static(x.mean(0), x.std(0), torch.rand(2, 8) * scale**2 + scale**2)
    y = (x - static.mu) * static.reciprocal
    torch.testing.assert_close(y.square().mean((0, 2)), torch.ones(2), rtol=1e-2, atol=0)


def test_a_constant_channel_and_one_that_nothing_reads_have_a_finite_scale() -> None:
    mean, std, reader = torch.zeros(3, 4), torch.ones(3, 4), torch.ones(3, 4)
    std[0, 1], reader[0, 2], std[1], reader[2] = 0, 0, 0, 0
    static = attention_static(mean, std, reader)
    for tensor in (static.mu, static.c, static.reciprocal):
        assert torch.isfinite(tensor).all()
    assert (static.c > 0).all()


def test_four_shards_come_to_the_numbers_of_one_run():
    """Statistics of parts, merged, have every bit of those of the whole, in whatever groups and order: min and max,
    moments, quantiles and what reads them, of values whose magnitudes are far apart."""
    generator = torch.Generator().manual_seed(0)

    def rows(n: int, *shape: int) -> torch.Tensor:
        return torch.randn(n, *shape, generator=generator) * 10 ** torch.randn(*shape, generator=generator) + 50

    windows = [(rows(128, 4, 16), rows(128, 2, 16), rows(128, 2, 8)) for _ in range(16)]

    def seen(part: list[tuple[torch.Tensor, ...]]) -> LayerStatistics:
        own = LayerStatistics(2, 16, 8)
        for q, k, v in part:
            own.read_by(q)
            own.update(k, v, 64)
        return own

    def merged(parts: list[list[tuple[torch.Tensor, ...]]]) -> LayerStatistics:
        first, *others = map(seen, parts)
        for other in others:
            first.merge(other)
        return first

    whole = seen(windows).summary()
    cuts = [[windows[i : i + 4] for i in range(0, 16, 4)], [windows[9:], windows[:2], windows[2:9]]]
    for cut in cuts:
        for side, statistics in merged(cut).summary().items():
            for name, own in statistics.items():
                assert torch.equal(own, whole[side][name]), (side, name)
