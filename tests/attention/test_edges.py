"""The rule of edges, by plain formulas: a query reads page 0 and its own span raw, and codes of all pages between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.attention import AttentionSpec, attend
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerPlan, LayerShape, plan_layers
from octavo.cache.store import KVCache
from octavo.devices import HOST
from octavo.quant.calibration import Calibration, Header
from octavo.quant.codec import Static, decode, encode
from octavo.quant.format import Codec, KVFormat
from tests.conftest import ranging

HEADER = Header("", "", 0, 0, 0, (0, 0), headroom=1.0)
KV_HEADS, GROUP, K_DIM, V_DIM = 2, 3, 16, 24
LENGTH = 150
FEATURES: list[dict[str, Any]] = [
    {}, {"window": 20}, {"window": 100}, {"softcap": 3.0}, {"sinks": True},
    {"window": 50, "softcap": 2.0, "sinks": True},
]  # fmt: skip


@dataclass
class Sequence:
    tokens: list[int]
    block_table: list[int]
    first_page: int
    ring: int
    num_cached: int = 0

    @property
    def tables(self) -> list[list[int]]:
        return [self.block_table]


class Layer:
    """One layer with a cache, and rows of a sequence of `length` tokens, of values that `dtype` holds."""

    def __init__(
        self,
        format: KVFormat,
        size: int,
        order: Any = "rows",
        dtype: torch.dtype = torch.float32,
        device: torch.device = HOST,
        length: int = LENGTH,
        **features: Any,
    ):
        random = torch.Generator().manual_seed(0)
        self.size, self.format, self.order, self.dtype, self.device = size, format, order, dtype, device
        self.length = length
        self.plan, self.calibration = self.plan_of(format, random, dtype, device)
        sinks = torch.randn(KV_HEADS * GROUP, generator=random).to(device) if features.pop("sinks", False) else None
        self.spec = AttentionSpec(self.plan.shape, KV_HEADS * GROUP, K_DIM**-0.5, sinks=sinks, **features)
        self.q = (torch.randn(length, KV_HEADS * GROUP, K_DIM, generator=random) * 2).to(dtype).float()
        self.k = (torch.randn(length, KV_HEADS, K_DIM, generator=random) + 1).to(dtype).float()
        self.v = (torch.randn(length, KV_HEADS, V_DIM, generator=random) - 1).to(dtype).float()

    @staticmethod
    def plan_of(
        format: KVFormat, random: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> tuple[LayerPlan, Calibration]:
        def ranges(dim: int) -> dict[str, Tensor]:
            middle = torch.randn(KV_HEADS, dim, generator=random)
            return ranging(middle - 5, middle + 5)

        calibration = Calibration(HEADER, [{"k": ranges(K_DIM), "v": ranges(V_DIM)}])
        shape = LayerShape(KV_HEADS, K_DIM, V_DIM, device, dtype=dtype)
        [plan] = plan_layers([shape], format, calibration)
        return plan, calibration

    def cache(self, sequences: int = 1) -> KVCache:
        """An empty one for so many sequences, with some blocks and pages more."""
        blocks, pages = -(-self.length // self.size), 1 + self.format.edges // self.size
        return KVCache([self.plan], sequences * blocks + 2, Layout(self.size, self.order), 2 + sequences * pages)

    def run(self, *cuts: list[int], cache: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """The answers of all rows [sequences·length, …] and the cache they left. Each of `cuts` says how many rows of a
        sequence each step computes; all sequences have the same rows."""
        cache = cache or self.cache(len(cuts))
        blocks, ring = -(-self.length // self.size), self.format.edges // self.size
        table = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        sequences = [
            Sequence([0] * self.length, table[i * blocks :][:blocks], i, 2 + len(cuts) + i * ring)
            for i in range(len(cuts))
        ]
        out: list[list[Tensor]] = [[] for _ in cuts]
        for step in zip(*cuts, strict=True):
            work = [(sequence, n) for sequence, n in zip(sequences, step, strict=True) if n]
            rows = torch.cat([sequence.num_cached + torch.arange(n) for sequence, n in work])
            given = (x[rows].to(self.device, self.dtype) for x in (self.q, self.k, self.v))
            batch = Batch.build(work, self.size, span=self.format.edges)
            answers = attend(self.spec, cache.layers[0], *given, batch).float().cpu()
            for own, sequence, n, answer in zip(out, sequences, step, answers.split(list(step)), strict=True):
                own.append(answer)
                sequence.num_cached += n
        assert all(sequence.num_cached == self.length for sequence in sequences)
        return torch.cat([answer for own in out for answer in own]), cache

    def expected(self) -> Tensor:
        """Row by row, over the values that the codes stand for and over the raw rows."""

        def coded(x: Tensor, codec: Codec, static: Static | None) -> Tensor:
            return decode(encode(x, codec, static), codec, x.shape[-1], static)

        k_static, v_static = (static.to(HOST) if static else None for static in (self.plan.k, self.plan.v))
        keys, values = coded(self.k, self.format.k, k_static), coded(self.v, self.format.v, v_static)
        spec, out = self.spec, torch.zeros(self.length, KV_HEADS * GROUP, V_DIM)
        for t in range(self.length):
            seen = range(max(0, t - spec.window + 1) if spec.window else 0, t + 1)
            raw = [j < self.size or j >= t // self.format.edges * self.format.edges for j in seen]
            own, every = torch.tensor(raw)[:, None, None], slice(seen.start, seen.stop)
            k = torch.where(own, self.k[every], keys[every]).repeat_interleave(GROUP, 1)
            v = torch.where(own, self.v[every], values[every]).repeat_interleave(GROUP, 1)
            score = torch.einsum("hd,jhd->hj", self.q[t], k) * spec.scale
            if spec.softcap:
                score = spec.softcap * torch.tanh(score / spec.softcap)
            if spec.sinks is not None:
                score = torch.cat([score, spec.sinks.cpu()[:, None]], 1)
            out[t] = torch.einsum("hj,jhd->hd", score.softmax(-1)[:, : len(raw)], v)
        return out


def with_span(name: str, span: int) -> KVFormat:
    return replace(KVFormat.parse(name), edges=span)


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize(
    ("name", "span", "size"),
    [("int8-token", 16, 16), ("int4-token", 32, 16), ("int8", 64, 16), ("int8/bf16", 64, 64)],
)
def test_a_query_reads_page_0_and_its_own_span_raw_and_codes_between(
    name: str, span: int, size: int, features: dict[str, Any]
) -> None:
    layer = Layer(with_span(name, span), size, **features)
    out, _ = layer.run([5, 1, 1, 40, 3, 17, 1, 30, 52])
    torch.testing.assert_close(out, layer.expected(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("cut", [1, 2, 14, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 149])
@pytest.mark.parametrize("span", [16, 32, 64])
def test_a_chunk_that_ends_anywhere_answers_as_the_whole_and_leaves_the_same_codes(span: int, cut: int) -> None:
    layer = Layer(with_span("int4-token", span), 16)
    whole, left = layer.run([LENGTH])
    cut_out, other = layer.run([cut, LENGTH - cut])
    torch.testing.assert_close(cut_out, whole, atol=2e-6, rtol=0)
    for a, b in zip(left.stores, other.stores, strict=True):
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales, b.scales)


def test_one_row_at_a_time_answers_as_the_whole() -> None:
    layer = Layer(with_span("int8-token", 32), 16)
    torch.testing.assert_close(layer.run([1] * LENGTH)[0], layer.run([LENGTH])[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("order", ["tiles", "pages"])
def test_raw_pages_lie_as_raw_blocks_do_in_every_layout(order: str) -> None:
    """Whatever backend reads them, a raw page holds the rows as the model computed them."""
    layer = Layer(with_span("int8-token", 16), 16, order)
    cache = KVCache([layer.plan], 2, Layout(16, order), 4)  # type: ignore[arg-type]
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:40]
    cache.layers[0].write(layer.k[:40], layer.v[:40], torch.full((40,), -1), slots)
    assert cache.layers[0].raw is not None
    for store, rows in zip(cache.layers[0].raw, (layer.k, layer.v), strict=True):
        back = store.layout.read_rows(store.codes, torch.arange(4)).transpose(0, 1)
        assert torch.equal(back[slots], rows[:40])


def test_a_layer_that_shares_a_cache_reads_the_ring_as_it_was_before_the_step() -> None:
    """The owner writes first: rows of a chunk that begins within a span take the places of those the sharer reads."""
    layer = Layer(with_span("int4-token", 16), 16)
    shared = replace(layer.spec, shape=replace(layer.spec.shape, shares=0))
    plans = [layer.plan, LayerPlan(shared.shape, layer.format)]
    cache = KVCache(plans, 12, Layout(16), 4)
    sequence = Sequence([0] * LENGTH, list(range(10)), 2, 3)
    for n in (20, 60, 70):
        batch = Batch.build([(sequence, n)], 16, span=16)
        rows = slice(sequence.num_cached, sequence.num_cached + n)
        given = layer.q[rows], layer.k[rows], layer.v[rows], batch
        own = attend(layer.spec, cache.layers[0], *given)
        assert torch.equal(attend(shared, cache.layers[1], *given), own)
        sequence.num_cached += n
