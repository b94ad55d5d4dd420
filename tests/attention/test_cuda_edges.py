"""The Triton kernels over raw pages, against the rule of edges computed row by row (tests/attention/test_edges.py).

Run in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from octavo.attention import attend
from octavo.attention.cuda.step import Step
from octavo.cache.batch import Batch
from octavo.cache.plan import LayerPlan
from octavo.cache.store import KVCache
from tests.attention.test_cuda import BF16, DEVICE, FP16, FP32, assert_close, kernels
from tests.attention.test_edges import Layer, Sequence, with_span
from tests.conftest import slow

CUTS = [5, 1, 33, 1, 40, 1, 19]
LENGTH = sum(CUTS)  # the interpreter takes seconds for a hundred rows


def paged(name: str, span: int, size: int = 64, **more: Any) -> Layer:
    return Layer(with_span(name, span), size, "pages", device=DEVICE, **{"length": LENGTH} | more)


def check(layer: Layer, *cuts: list[int], cache: KVCache | None = None) -> KVCache:
    """Computed so, the rows of every sequence answer as the rule says, in the dtype's accuracy."""
    out, cache = layer.run(*cuts, cache=cache)
    assert_close(out.to(layer.dtype), layer.expected().repeat(len(cuts), 1, 1).double().numpy())
    return cache


CASES: list[Any] = [
    ("int8", 32, 32, {"window": 100, "dtype": BF16}),
    ("int8-token/int4-token", 64, 32, {"softcap": 3.0, "dtype": FP16}),
    *slow(
        ("int8-token", 64, 16, {"window": 20, "softcap": 2.0, "sinks": True, "dtype": BF16}),
        ("bf16/int4-token", 32, 16, {"sinks": True, "dtype": BF16}),
        ("int8/bf16", 32, 32, {"dtype": BF16}),
        ("int8-token", 64, 64, {"length": 150}),
        ("int4-token", 32, 16, {"window": 50, "sinks": True}),
    ),
]


@kernels
@pytest.mark.parametrize(("name", "span", "size", "more"), CASES, ids=str)
def test_a_query_reads_page_0_and_its_own_span_raw_and_codes_between(
    name: str, span: int, size: int, more: dict[str, Any]
) -> None:
    layer = paged(name, span, size, **more)
    check(layer, [*CUTS, layer.length - LENGTH] if layer.length > LENGTH else CUTS)


@kernels
@pytest.mark.parametrize("span", slow(128, 256))
def test_an_own_span_may_be_several_pages(span: int) -> None:
    check(paged("int8-token", span, length=span + 60), [span - 10, 1, 69])


@kernels
@pytest.mark.parametrize("cut", [17, *slow(64, 1, 15, 31, 96, 99)])
def test_a_chunk_that_ends_anywhere_answers_by_the_rule_and_leaves_the_same_rows(cut: int) -> None:
    """Codes, scales and raw rows are those that the reference writes."""
    layer = paged("int4-token", 32, 16)
    left = check(layer, [cut, LENGTH - cut])
    _, expected = Layer(layer.format, 16, "rows", length=LENGTH).run([LENGTH])
    for a, b in zip(left.stores, expected.stores, strict=True):
        blocks = torch.arange(left.num_blocks)
        assert torch.equal(a.layout.read_rows(a.codes.cpu(), blocks), b.layout.read_rows(b.codes, blocks))
        assert a.scales is not None
        assert b.scales is not None
        assert torch.equal(a.scales.cpu(), b.scales)
    newest, page = LENGTH % 32, torch.tensor([0])
    for a, b in zip(left.raw_stores, expected.raw_stores, strict=True):
        assert torch.equal(a.layout.read_rows(a.codes.cpu(), page), b.layout.read_rows(b.codes, page))
        ring = torch.tensor([3, 4])
        own = (store.layout.read_rows(store.codes.cpu(), ring)[:, :newest] for store in (a, b))
        assert torch.equal(*own)


@kernels
def test_chunks_and_decodes_of_several_sequences_share_a_step() -> None:
    layer = paged("int8-token", 32, 16)
    check(layer, [40, 1, 24, 35], [0, 65, 1, 34])


@kernels
@pytest.mark.slow
def test_contexts_are_split_among_programs_beside_the_one_that_reads_raw_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.attention.cuda import launch

    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)  # noqa: ARG005
    check(paged("int4-token", 32, 16, sinks=True), [70, 1, 1, 20, 8])


@kernels
@pytest.mark.parametrize("name", ["int8/bf16", *slow("int8-token")])
def test_nan_that_a_freed_page_held_reaches_no_row(name: str) -> None:
    layer = paged(name, 32, 16, dtype=BF16)
    cache = layer.cache()
    for store in cache.raw_stores:
        store.codes.fill_(torch.nan)
    check(layer, CUTS, cache=cache)


@kernels
def test_a_layer_that_shares_a_cache_reads_the_ring_as_it_was_before_the_step() -> None:
    """The owner writes first: rows of a chunk that begins within a span take the places of those the sharer reads."""
    layer = paged("int4-token", 16, 16)
    shared = replace(layer.spec, shape=replace(layer.spec.shape, shares=0))
    cache = KVCache([layer.plan, LayerPlan(shared.shape, layer.format)], 12, layer.cache().layout, 4)
    sequence = Sequence([0] * LENGTH, list(range(10)), 2, 3)
    for n in (20, 1, 19):
        batch = Batch.build([(sequence, n)], 16, span=16)
        rows = slice(sequence.num_cached, sequence.num_cached + n)
        given = [x[rows].to(DEVICE) for x in (layer.q, layer.k, layer.v)]
        own = attend(layer.spec, cache.layers[0], *given, batch)
        before = [store.codes.clone() for store in (*cache.stores, *cache.raw_stores)]
        assert torch.equal(attend(shared, cache.layers[1], *given, batch), own)
        after = [store.codes for store in (*cache.stores, *cache.raw_stores)]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        sequence.num_cached += n


@kernels
def test_a_padded_row_of_a_graph_writes_nowhere_and_is_zero() -> None:
    layer = paged("int8-token", 32, 16, length=40)
    cache = check(layer, [40])
    batch = Batch.build([(Sequence([0], [0], 0, 3), 1)] * 2, 16, span=32)
    batch.kv_len, batch.slots, batch.raw_slots = torch.zeros(2, dtype=torch.int64), *torch.full((2, 2), -1)
    before = [store.codes.clone() for store in (*cache.stores, *cache.raw_stores)]
    given = (x[:2].to(DEVICE) for x in (layer.q, layer.k, layer.v))
    assert not attend(layer.spec, cache.layers[0], *given, batch).any()
    after = [store.codes for store in (*cache.stores, *cache.raw_stores)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@kernels
@pytest.mark.slow
def test_rows_may_be_of_another_type_than_the_raw_pages() -> None:
    """As a model's queries are after a norm in float32."""
    layer = paged("int8-token", 32, 16, dtype=BF16)
    layer.dtype = FP32  # of what is handed over; its values are those of bf16
    check(layer, CUTS)


@kernels
@pytest.mark.slow
def test_the_operator_declares_that_it_writes_raw_pages() -> None:
    from octavo.attention.cuda.launch import edges_of, layer_of

    layer = paged("int8-token", 32, 16)
    cache = layer.cache().layers[0]
    batch = Batch.build([(Sequence([0] * 40, [0, 1, 2], 0, 3), 40)], 16, span=32).on(DEVICE)
    q, k, v = (x[:40].to(DEVICE) for x in (layer.q, layer.k, layer.v))
    made, step = layer_of(layer.spec, cache), Step.of(batch)
    given = (q, k, v, batch.slots, batch.block_table, step.q_start, step.kv_len, step.tiles(1))
    given += (step.tiles(made.chunk.queries), *edges_of(layer.spec, cache, batch), made.memory, made.number)
    torch.library.opcheck(torch.ops.octavo.attend.default, given, test_utils=("test_schema", "test_faketensor"))
