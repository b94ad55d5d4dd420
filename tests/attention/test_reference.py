"""The reference against plain float64 attention in numpy over the decoded values of the same codes."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from torch import Tensor

from octavo.attention import AttentionSpec, attend, reference
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.row_store import RowStore
from octavo.cache.store import KVCache
from octavo.quant.calibration import Calibration, Header
from octavo.quant.codec import Rows, decode, encode
from octavo.quant.format import CODECS, KVFormat
from tests.conftest import ranging

Array = NDArray[np.float64]

HEADER = Header("f", dataset="none", samples=1, seqlen=1, tokens=1, positions=(0, 0), headroom=1.0)
SOME = ["bf16", "int8", "int8-token", "int4-token", "int8-token/int4-token"]
CONTEXT = 200  # most tokens of a sequence of these tests


@dataclass
class Sequence:
    """A sequence, and what it has written so far."""

    block_table: list[int]
    tokens: list[int] = field(default_factory=lambda: [0] * CONTEXT)
    num_cached: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def tables(self) -> list[list[int]]:
        return [self.block_table]


@dataclass(frozen=True)
class Case:
    """One layer and its cache. `place` is how far K and V are from zero, in units of their spread."""

    format: str = "int8"
    k_dim: int = 64
    v_dim: int = 64
    kv_heads: int = 2
    group: int = 2
    block_size: int = 16
    calibrated: bool = True
    place: float = 1.0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != type(self).__dataclass_fields__[k].default}
        return "-".join(f"{k}={v}" for k, v in changed.items()) or "plain"


class Layer:
    """A layer with its cache, fed with random rows; every step is compared with numpy."""

    def __init__(self, case: Case, sequences: int = 1, seed: int = 0):
        self.case = case
        self.random = torch.Generator().manual_seed(seed)
        shape = LayerShape(case.kv_heads, case.k_dim, case.v_dim)
        heads = case.kv_heads * case.group
        self.spec = AttentionSpec(
            shape, heads, case.k_dim**-0.5, case.window, case.softcap, self.normal(heads) * 2 if case.sinks else None
        )
        self.k_place = self.normal(case.kv_heads, case.k_dim) * case.place
        self.v_place = self.normal(case.kv_heads, case.v_dim) * case.place
        sides = {"k": self.ranges(self.k_place), "v": self.ranges(self.v_place)}
        self.calibration = Calibration(HEADER, [sides]) if case.calibrated else None
        each = -(-CONTEXT // case.block_size)
        self.cache = self.empty_cache(sequences * each, "rows")
        order = torch.randperm(sequences * each, generator=self.random).tolist()
        self.sequences = [Sequence(order[i * each : (i + 1) * each]) for i in range(sequences)]

    def empty_cache(self, blocks: int, order: Literal["rows", "tiles", "pages"]) -> KVCache:
        layout = Layout(self.case.block_size, order)
        format = KVFormat.parse(self.case.format)
        return KVCache(plan_layers([self.spec.shape], format, self.calibration), blocks, layout)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    @staticmethod
    def ranges(place: Tensor) -> dict[str, Tensor]:
        return ranging(place - 4, place + 4)

    def keys(self, rows: int) -> Tensor:
        return self.normal(rows, self.case.kv_heads, self.case.k_dim) + self.k_place

    def values(self, rows: int) -> Tensor:
        return self.normal(rows, self.case.kv_heads, self.case.v_dim) + self.v_place

    def queries(self, rows: int) -> Tensor:
        return self.normal(rows, self.spec.heads, self.case.k_dim) * 2

    def feed(self, work: Items[tuple[int, int]], q: Tensor, k: Tensor, v: Tensor, batch: Batch | None = None) -> Tensor:
        """Attend as one step of `work`, (sequence, new tokens), and remember what was written."""
        batch = batch or Batch.build([(self.sequences[i], n) for i, n in work], self.case.block_size)
        out = attend(self.spec, self.cache.layers[0], q, k, v, batch)
        lengths = [n for _, n in work]
        for (i, n), keys, values in zip(work, k.split(lengths), v.split(lengths), strict=True):
            self.sequences[i].keys.append(keys)
            self.sequences[i].values.append(values)
            self.sequences[i].num_cached += n
        return out

    def step(self, work: Items[tuple[int, int]], batch: Batch | None = None) -> Tensor:
        """A step with random rows, compared with numpy."""
        lengths = [n for _, n in work]
        rows = sum(lengths)
        q, k, v = self.queries(rows), self.keys(rows), self.values(rows)
        out = self.feed(work, q, k, v, batch)
        assert out.shape == (rows, self.spec.heads, self.case.v_dim)
        assert out.dtype == q.dtype
        for (i, _), queries, answers in zip(work, q.split(lengths), out.split(lengths), strict=True):
            self.compare(self.sequences[i], queries, answers)
        return out

    def compare(self, sequence: Sequence, q: Tensor, out: Tensor) -> None:
        """`out` is attention of the sequence's last rows `q` over all that it has written."""
        layer, total = self.cache.layers[0], sequence.num_cached
        keys, values = stored(layer.k, sequence), stored(layer.v, sequence)
        assert_stored(layer.k, sequence, torch.cat(sequence.keys))
        assert_stored(layer.v, sequence, torch.cat(sequence.values))
        expected = numpy_attention(self.spec, q.double().numpy(), keys, values, first=total - len(q))
        # Float32 sums of values that are `place` large and of codes up to 128: a few 1e-6 of them.
        scale = 1 + np.abs(values).max()
        np.testing.assert_allclose(
            out.double().numpy(), expected, rtol=0, atol=5e-6 * scale
        )  # a rotation sums a row in float32


def rows_of(store: RowStore, sequence: Sequence) -> Rows:
    """The sequence's own rows, [tokens, heads, ·], as they lie in the cache."""
    table, total = torch.tensor(sequence.block_table), sequence.num_cached
    codes = store.layout.read_rows(store.codes, table).transpose(0, 1)[:total]
    if store.scales is None:
        return Rows(codes)
    return Rows(codes, store.scale_layout.read_rows(store.scales, table).transpose(0, 1)[:total, :, 0])


def stored(store: RowStore, sequence: Sequence) -> Array:
    return decode(rows_of(store, sequence), store.codec, store.dim, store.static).double().numpy()


def assert_stored(store: RowStore, sequence: Sequence, x: Tensor) -> None:
    """The sequence's blocks hold its rows, bit for bit, however they were cut into steps."""
    rows, expected = rows_of(store, sequence), encode(x, store.codec, store.static)
    assert torch.equal(rows.codes, expected.codes)
    assert (rows.scales is None) == (expected.scales is None)
    if rows.scales is not None and expected.scales is not None:
        assert torch.equal(rows.scales, expected.scales)


def numpy_attention(spec: AttentionSpec, q: Array, keys: Array, values: Array, first: int) -> Array:
    """One query and head at a time: q [n, heads, k_dim] at positions first…, keys and values [tokens, kv_heads, ·]."""
    group = spec.heads // keys.shape[1]
    out = np.zeros((len(q), spec.heads, values.shape[2]))
    for i in range(len(q)):
        stop = first + i + 1
        start = 0 if spec.window is None else max(0, stop - spec.window)
        for head in range(spec.heads):
            score = spec.scale * keys[start:stop, head // group] @ q[i, head]
            if spec.softcap is not None:
                score = spec.softcap * np.tanh(score / spec.softcap)
            logits = score if spec.sinks is None else np.append(score, spec.sinks[head].item())
            weights = np.exp(score - logits.max()) / np.exp(logits - logits.max()).sum()
            out[i, head] = weights @ values[start:stop, head // group]
    return out


def answer(case: Case, q: Tensor, k: Tensor, v: Tensor, cuts: Items[int]) -> tuple[Tensor, Layer]:
    """One sequence's rows attended to in chunks of the given lengths."""
    layer, outs = Layer(case), []
    cuts = list(cuts)
    for part in zip(q.split(cuts), k.split(cuts), v.split(cuts), strict=True):
        outs.append(layer.feed([(0, len(part[0]))], *part))
    return torch.cat(outs), layer


FORMATS = [
    Case("bf16", 64, 64, 2, 3),
    Case("fp16", 80, 80, 1, 4),
    Case("fp32", 96, 96, 2, 1),
    Case("int8", 64, 64, 1, 8),
    Case("int8", 80, 80, 2, 3),
    Case("int8", 96, 96, 4, 1),
    Case("int8", 128, 128, 2, 4),
    Case("int8", 256, 256, 1, 3),
    Case("fp8", 80, 80, 2, 3),
    Case("fp8/int8", 64, 64, 1, 4),
    Case("int8-token", 64, 64, 2, 4),
    Case("int8-token", 96, 96, 3, 1, calibrated=False),
    Case("int8-token", 256, 256, 1, 1),
    Case("int8-token-unrotated", 80, 80, 2, 3),
    Case("int8-token-unrotated", 128, 128, 1, 8, calibrated=False),
    Case("int4-token", 64, 64, 1, 3, calibrated=False),
    Case("int4-token", 80, 80, 1, 8),
    Case("int4-token", 96, 96, 2, 4, calibrated=False),
    Case("int4-token", 128, 128, 2, 1),
    Case("int4-token", 256, 256, 1, 4, calibrated=False),
    Case("int4-token-unrotated", 96, 96, 1, 3),
    Case("int4-token-unrotated", 128, 128, 1, 4, calibrated=False),
    Case("int8-token/int4-token", 128, 128, 1, 8),
    Case("int4-token/int8-token", 64, 64, 2, 1, calibrated=False),
    Case("bf16/int8-token", 80, 80, 1, 3),
    Case("bf16/int8", 64, 64, 1, 4),
    Case("int8/int4-token", 96, 96, 2, 3),
    Case("int8-token/bf16", 256, 256, 1, 1, calibrated=False),
]


@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_a_prompt_and_some_tokens_are_plain_attention_over_the_decoded_cache(case: Case) -> None:
    layer = Layer(case)
    for new in (37, 1, 1, 12):
        layer.step([(0, new)])


@pytest.mark.parametrize("format", ["fp32", *SOME])
@pytest.mark.parametrize("dims", [(64, 96), (24, 12), (17, 31), (7, 64)], ids=str)
def test_k_and_v_may_have_different_and_odd_dims(format: str, dims: tuple[int, int]) -> None:
    layer = Layer(Case(format, *dims, kv_heads=2, group=3))
    for new in (21, 1):
        layer.step([(0, new)])


FEATURES: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 16},
    {"window": 17},
    {"softcap": 2.0},
    {"sinks": True},
    {"softcap": 1.5, "sinks": True},
    {"window": 20, "softcap": 3.0, "sinks": True},
]


@pytest.mark.parametrize("feature", FEATURES, ids=str)
@pytest.mark.parametrize("format", SOME)
def test_window_softcap_and_sinks_in_any_combination(format: str, feature: dict[str, Any]) -> None:
    layer = Layer(Case(format, place=3, **feature), sequences=2)
    layer.step([(0, 30), (1, 5)])
    layer.step([(0, 1), (1, 1)])
    layer.step([(1, 33), (0, 1)])


@pytest.mark.parametrize("feature", [{"softcap": 2.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("format", ["int8", "int8-token", "int4-token", "int8-token-unrotated"])
def test_the_static_part_of_k_reaches_scores_that_are_not_shift_invariant(format: str, feature: dict[str, Any]) -> None:
    """q·mu is the same for every key, so softmax drops it, but a soft cap and a sink do not: without it these fail."""
    case = Case(format, place=6, **feature)
    layer = Layer(case)
    layer.step([(0, 20)])
    layer.step([(0, 1)])
    k_static = layer.cache.layers[0].k.static
    assert k_static is not None
    q = layer.queries(1)
    shift = (q.unflatten(1, (2, 2)) * k_static.mu[:, None]).sum(-1) * layer.spec.scale
    assert shift.abs().max() > 3  # large enough to be missed


def test_a_sink_weighs_against_the_mean_of_v_too() -> None:
    """With sinks the weights sum to less than 1, and mu_v counts only by that sum."""
    case = Case("int8", kv_heads=1, group=1, sinks=True)
    layer = Layer(case)
    layer.v_place += 50
    layer.cache.layers[0].v.static = replace(layer.cache.layers[0].v.static, mu=layer.v_place)  # type: ignore[type-var]
    layer.spec = replace(layer.spec, sinks=torch.tensor([40.0]))
    assert layer.step([(0, 9)]).abs().max() < 1e-6
    layer.spec = replace(layer.spec, sinks=torch.tensor([-40.0]))
    assert layer.step([(0, 1)]).mean().item() == pytest.approx(layer.v_place.mean().item(), abs=1)


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129])
def test_contexts_that_end_at_a_blocks_edge(format: str, length: int) -> None:
    layer = Layer(Case(format, k_dim=64, v_dim=64, kv_heads=1, group=2, block_size=64), sequences=2)
    layer.step([(0, length)])
    layer.step([(0, 1), (1, length)])
    layer.step([(1, 1), (0, 1)])


@pytest.mark.parametrize("window", [63, 64, 65])
def test_windows_that_end_at_a_blocks_edge(window: int) -> None:
    layer = Layer(Case("int8", kv_heads=1, group=1, block_size=64, window=window), sequences=2)
    layer.step([(0, 100), (1, 62)])
    for _ in range(4):
        layer.step([(0, 1), (1, 1)])
    layer.step([(0, 30), (1, 80)])


@pytest.mark.parametrize("format", SOME)
def test_chunks_and_decodes_of_many_sequences_share_a_step(format: str) -> None:
    layer = Layer(Case(format, kv_heads=2, group=3, block_size=8), sequences=7)
    layer.step([(3, 20), (0, 1), (5, 20), (1, 7)])
    layer.step([(1, 1), (3, 1), (2, 41), (0, 1), (5, 1), (6, 41)])
    layer.step([(4, 3), (6, 1), (2, 1), (1, 3), (5, 9), (0, 1), (3, 1)])


def test_contexts_of_very_different_lengths_are_decoded_together() -> None:
    layer = Layer(Case("int8", kv_heads=1, group=2, block_size=2), sequences=4)
    layer.step([(0, 180), (1, 1), (2, 33), (3, 90)])
    layer.step([(0, 1), (1, 1), (2, 1), (3, 1)])


@st.composite
def schedules(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Steps of up to three sequences in any order, each with up to 20 new tokens."""
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        order = draw(st.permutations([0, 1, 2]))[: draw(st.integers(1, 3))]
        steps.append([(i, draw(st.one_of(st.just(1), st.integers(1, 20)))) for i in order])
    return steps


cases = st.builds(
    Case,
    format=st.sampled_from([*CODECS, "int8-token/int4-token", "int4-token/int8-token", "int8/bf16"]),
    k_dim=st.sampled_from([4, 5, 16]),
    v_dim=st.sampled_from([4, 7, 16]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 4]),
    block_size=st.sampled_from([1, 4, 64]),
    place=st.sampled_from([0.0, 2.0]),
    window=st.sampled_from([None, 1, 4, 5, 30]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
)


@given(cases, schedules(), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_any_layer_under_any_schedule(case: Case, steps: list[list[tuple[int, int]]], seed: int) -> None:
    layer = Layer(case, sequences=3, seed=seed)
    for work in steps:
        layer.step(work)


# How the work is cut


@pytest.mark.parametrize("format", ["fp32", *SOME])
@pytest.mark.parametrize("feature", [{}, {"window": 10, "softcap": 3.0, "sinks": True}], ids=str)
def test_a_prompt_in_chunks_answers_as_a_whole_one(format: str, feature: dict[str, Any]) -> None:
    case = Case(format, **feature)
    source = Layer(case)
    q, k, v = source.queries(60), source.keys(60), source.values(60)
    whole, once = answer(case, q, k, v, [60])
    for cuts in ([20, 20, 20], [1] * 60, [16, 16, 28], [59, 1]):
        out, layer = answer(case, q, k, v, cuts)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)
        for a, b in zip(layer.cache.stores, once.cache.stores, strict=True):
            assert torch.equal(rows_of(a, layer.sequences[0]).codes, rows_of(b, once.sequences[0]).codes)
            assert a.saturated.item() == b.saturated.item()


@pytest.mark.parametrize("format", SOME)
def test_neighbours_in_a_step_do_not_change_an_answer(format: str) -> None:
    case = Case(format, block_size=8)
    alone, together = Layer(case, sequences=3), Layer(case, sequences=3)
    q, k, v = alone.queries(30), alone.keys(30), alone.values(30)
    expected = alone.feed([(1, 30)], q, k, v)
    wild = [torch.cat([1e4 * x[:9], x, 1e4 * x[:30]]) for x in (q, k, v)]  # 9 rows, ours, 30 more
    out = together.feed([(0, 9), (1, 30), (2, 30)], *wild)
    torch.testing.assert_close(out[9:39], expected, rtol=0, atol=1e-5)
    wild = [torch.cat([1e4 * x[:1], x[:1], 1e4 * x[1:2]]) for x in (q, k, v)]
    out = together.feed([(2, 1), (1, 1), (0, 1)], *wild)
    torch.testing.assert_close(out[1:2], alone.feed([(1, 1)], q[:1], k[:1], v[:1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 4096, 1 << 30])
@pytest.mark.parametrize("format", SOME)
def test_the_size_of_a_tile_does_not_change_an_answer(
    format: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(format, block_size=8, window=90, sinks=True)
    expected = Layer(case, sequences=2)
    steps = [[(0, 100), (1, 40)], [(0, 1), (1, 1)], [(1, 17), (0, 17)]]
    outs = [expected.step(work) for work in steps]
    monkeypatch.setattr(reference, "TILE_ELEMENTS", elements)
    tiled = Layer(case, sequences=2)
    tiles: list[int] = []
    read = RowStore.read

    def counted(self: RowStore, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        tiles.append(len(blocks))
        return read(self, blocks)

    monkeypatch.setattr(RowStore, "read", counted)
    for work, out in zip(steps, outs, strict=True):
        torch.testing.assert_close(tiled.step(work), out, rtol=0, atol=1e-5)
    if elements == 1:
        assert max(tiles) == 2  # one block of each of the two sequences that decode
    if elements == 1 << 30:
        assert len(tiles) == 2 * 4  # K and V, once for each of two prompts, of the decodes, and of the two chunks


def test_blocks_before_a_window_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(Case("int8", kv_heads=1, group=1, block_size=4, window=6))
    layer.step([(0, 150)])
    seen: list[int] = []
    read = RowStore.read
    monkeypatch.setattr(RowStore, "read", lambda self, blocks: (seen.extend(blocks.tolist()), read(self, blocks))[1])
    layer.step([(0, 1)])
    assert set(seen) == set(layer.sequences[0].block_table[145 // 4 : 151 // 4 + 1])


# Rows that are out of the ordinary


def check_the_next_owner(kind: type[Layer], format: str) -> None:
    """Blocks that held NaN answer their next, shorter owner as blocks that held nothing do."""
    new, used = (kind(Case(format, block_size=64), sequences=2) for _ in range(2))
    nan = torch.full((150, 2, 64), torch.nan)
    for i in range(2):
        used.feed([(i, 150)], used.queries(150), nan, nan)
        used.sequences[i] = Sequence(used.sequences[i].block_table)
    for work in ([(0, 130), (1, 20)], [(0, 1), (1, 1)], [(0, 3), (1, 1)]):
        rows = sum(n for _, n in work)
        q, k, v = new.queries(rows), new.keys(rows), new.values(rows)
        assert torch.equal(used.feed(work, q, k, v), new.feed(work, q, k, v))


@pytest.mark.parametrize("format", ["bf16", "fp16", "fp32"])
def test_a_block_tells_its_next_owner_nothing(format: str) -> None:
    check_the_next_owner(Layer, format)


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_row_that_attends_to_nothing_is_zero(format: str, sinks: bool, softcap: float | None) -> None:
    case = Case(format, place=3, sinks=sinks, softcap=softcap)
    layer = Layer(case, sequences=2)
    layer.step([(0, 20), (1, 20)])
    q = layer.queries(2)
    batch = Batch.build([(layer.sequences[0], 1), (layer.sequences[1], 1)], case.block_size)
    batch.kv_len = torch.tensor([0, 20])
    out = reference.read(layer.spec, layer.cache.layers[0], q, batch)
    assert torch.isfinite(out).all()
    assert not out[0].any()
    layer.compare(layer.sequences[1], q[1:], out[1:])
    batch.kv_len, batch.plan = torch.tensor([0, 0]), {}
    assert not reference.read(layer.spec, layer.cache.layers[0], q, batch).any()


@pytest.mark.parametrize("case", [Case(name, place=2) for name in [*CODECS, "int8-token/int4-token"]], ids=str)
def test_constant_rows_answer_with_the_constant(case: Case) -> None:
    layer = Layer(case)
    k, v = layer.keys(1).expand(40, -1, -1), layer.values(1).expand(40, -1, -1)
    q = layer.queries(40)
    out = layer.feed([(0, 40)], q, k, v)
    layer.compare(layer.sequences[0], q, out)
    (constant,) = np.unique(stored(layer.cache.layers[0].v, layer.sequences[0]), axis=0)
    np.testing.assert_allclose(out.numpy(), np.broadcast_to(constant.repeat(2, 0), out.shape), rtol=0, atol=2e-5)


@pytest.mark.parametrize("format", [*CODECS, "int8-token/int4-token"])
def test_rows_of_zeros_answer_with_almost_zero(format: str) -> None:
    layer = Layer(Case(format, calibrated=format == "int8", place=0))
    zeros = torch.zeros(10, 2, 64)
    out = layer.feed([(0, 10)], torch.zeros(10, 4, 64), zeros, zeros)
    assert out.abs().max() < 0.02
    if not any(store.codec.bits == 4 for store in layer.cache.stores):
        assert out.abs().max() < 1e-6


@pytest.mark.parametrize("format", [*CODECS, "int8-token/int4-token"])
def test_outliers_a_hundred_times_the_rest(format: str) -> None:
    """A channel, a token and a value far outside: saturated where the format clips, but read as they are stored."""
    layer = Layer(Case(format))
    q, k, v = layer.queries(50) / 20, layer.keys(50), layer.values(50)
    for x in (k, v):
        x[..., 5] *= 100
        x[17] *= 100
        x[30, 1, 3] = -5000
    out = layer.feed([(0, 50)], q, k, v)
    layer.compare(layer.sequences[0], q, out)


@pytest.mark.parametrize("format", [*CODECS, "int8-token/int4-token"])
def test_a_strong_first_token_does_not_swallow_the_tail(format: str) -> None:
    """A sink token 12 nats above 32k others leaves them 1 − e¹²/(e¹² + 32768) = 17 % of the weight."""
    others, dim = 32768, 16
    shape = LayerShape(1, dim, dim)
    ones = torch.ones(1, dim)
    sides = {"k": ranging(-ones, ones), "v": ranging(-ones, ones)}
    cache = KVCache(plan_layers([shape], KVFormat.parse(format), calibration=Calibration(HEADER, [sides])), 513)
    k = torch.zeros(others + 1, 1, dim)
    k[0, 0, 0] = 1
    v = torch.full((others + 1, 1, dim), 0.75)
    v[0] = -0.75
    cache.layers[0].write(k, v, torch.arange(others + 1))
    q = torch.zeros(1, 1, dim)
    q[0, 0, 0] = 12
    sequence = Sequence(list(range(513)), tokens=[0] * (others + 1), num_cached=others)
    batch = Batch.build([(sequence, 1)], 64)
    sequence.num_cached += 1
    spec = AttentionSpec(shape, heads=1, scale=1.0)
    out = reference.read(spec, cache.layers[0], q, batch)
    keys, values = stored(cache.layers[0].k, sequence), stored(cache.layers[0].v, sequence)
    expected = numpy_attention(spec, q.double().numpy(), keys, values, first=others)
    # A plain float32 sum may lose half a unit in its last place, 2⁻²⁵, with each of the others: 0.4 % of their weight.
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=0, atol=others * 2**-25)
    tail = others / (others + math.exp(12))
    if "int4" not in format and format != "int8-token/int4-token":
        assert out.mean().item() == pytest.approx(0.75 * tail - 0.75 * (1 - tail), abs=0.03)


def test_scores_of_hundreds_of_nats_stay_finite() -> None:
    layer = Layer(Case("int8-token", sinks=True))
    q, k, v = layer.queries(30) * 300, layer.keys(30), layer.values(30)
    out = layer.feed([(0, 30)], q, k, v)
    assert torch.isfinite(out).all()
    assert out.abs().max() <= v.abs().max() * 1.05


@pytest.mark.parametrize("format", SOME)
def test_scores_far_below_zero_are_as_good_as_any(format: str) -> None:
    """Every key points away from the query: softmax must not see that the largest score is hundreds of nats below 0."""
    layer = Layer(Case(format, kv_heads=1, group=2, place=0))
    q = torch.full((20, 2, 64), -40.0)
    out = layer.feed([(0, 20)], q, 3 + layer.normal(20, 1, 64) / 100, layer.values(20))
    keys, values = (stored(store, layer.sequences[0]) for store in layer.cache.stores)
    assert (layer.spec.scale * -40 * keys.sum(-1)).max() < -500
    expected = numpy_attention(layer.spec, q.double().numpy(), keys, values, first=0)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=0, atol=5e-3)


# The dispatcher


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_queries_are_computed_in_float32_and_rounded_once(format: str, dtype: torch.dtype) -> None:
    case = Case(format, sinks=True, softcap=4.0)
    source = Layer(case)
    q, k, v = (x.to(dtype) for x in (source.queries(20), source.keys(20), source.values(20)))
    half, _ = answer(case, q, k, v, [19, 1])
    full, _ = answer(case, q.float(), k.float(), v.float(), [19, 1])
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


def test_rows_may_be_the_transposed_views_that_a_model_hands_over() -> None:
    case = Case("int8-token/int4-token", kv_heads=2, group=3)
    source = Layer(case)
    q, k, v = source.queries(20), source.keys(20), source.values(20)
    out, _ = answer(case, q, k, v, [20])
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    strided, _ = answer(case, *views, [20])
    torch.testing.assert_close(strided, out, rtol=0, atol=1e-6)


def test_inputs_are_not_changed() -> None:
    case = Case("int8", softcap=2.0, sinks=True)
    source = Layer(case)
    rows = [source.queries(20), source.keys(20), source.values(20)]
    before = [x.clone() for x in rows]
    answer(case, *rows, [20])
    assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))


@pytest.mark.parametrize("format", SOME)
def test_attending_reads_the_cache_and_changes_nothing(format: str) -> None:
    layer = Layer(Case(format))
    layer.step([(0, 30)])
    before = [t.clone() for store in layer.cache.stores for t in (store.codes, store.scales) if t is not None]
    batch = Batch.build([(layer.sequences[0], 1)], 16)
    first = reference.read(layer.spec, layer.cache.layers[0], layer.queries(1), batch)
    after = [t for store in layer.cache.stores for t in (store.codes, store.scales) if t is not None]
    assert first.any()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("order", ["tiles", "pages"])
@pytest.mark.parametrize("format", ["fp32", *SOME])
def test_the_layout_of_the_cache_does_not_change_an_answer(format: str, order: Any) -> None:
    layer = Layer(Case(format, sinks=True), sequences=2)
    tiles = layer.empty_cache(layer.cache.num_blocks, order).layers[0]
    for work in ([(0, 30), (1, 50)], [(1, 1), (0, 1)]):
        rows = sum(n for _, n in work)
        q, k, v = layer.queries(rows), layer.keys(rows), layer.values(rows)
        batch = Batch.build([(layer.sequences[i], n) for i, n in work], layer.case.block_size)
        expected = layer.feed(work, q, k, v, batch)
        tiles.write(k, v, batch.slots)
        assert torch.equal(reference.read(layer.spec, tiles, q, batch), expected)


def test_a_layer_that_shares_another_reads_its_cache_and_writes_none() -> None:
    case = Case("int8-token")
    own = Layer(case)
    shared = replace(own.spec, shape=replace(own.spec.shape, shares=0))
    cache = KVCache(plan_layers([own.spec.shape, shared.shape], KVFormat.parse("int8-token")), 13, Layout(16))
    sequence = own.sequences[0]
    batch = Batch.build([(sequence, 25)], 16)
    q, k, v = own.queries(25), own.keys(25), own.values(25)
    first = attend(own.spec, cache.layers[0], q, k, v, batch)
    before = [store.codes.clone() for store in cache.stores]
    written = [store.written for store in cache.stores]
    second = attend(shared, cache.layers[1], q, torch.full_like(k, torch.nan), torch.full_like(v, torch.nan), batch)
    assert torch.equal(first, second)
    assert all(torch.equal(store.codes, old) for store, old in zip(cache.stores, before, strict=True))
    assert [store.written for store in cache.stores] == written == [25 * 2 * 64] * 2


def test_a_step_writes_before_it_reads() -> None:
    """The row that a chunk adds is read back as its codes, by the chunk itself: int8 of 0.4 with steps of 1 is 0."""
    shape = LayerShape(1, 4, 4)
    ranges = ranging(torch.full((1, 4), -127.5), torch.full((1, 4), 127.5))
    calibration = Calibration(HEADER, [{"k": ranges, "v": ranges}])
    cache = KVCache(plan_layers([shape], KVFormat.parse("int8"), calibration), 1, Layout(4))
    v = torch.full((2, 1, 4), 0.4)
    batch = Batch.build([(Sequence([0], [1, 2]), 2)], 4)
    out = attend(AttentionSpec(shape, 1, 1.0), cache.layers[0], torch.zeros(2, 1, 4), v, v, batch)
    assert not out.any()
    out = attend(AttentionSpec(shape, 1, 1.0), cache.layers[0], torch.zeros(2, 1, 4), v, v + 3.1, batch)
    assert out.unique().tolist() == [4.0]


def test_layers_of_different_kinds_share_a_steps_batch() -> None:
    """Windowed and full layers of different geometry in turn: what one left in the plan serves the next."""
    cases = [
        Case("int8", 16, 16, 2, 2),
        Case("int4-token", 16, 8, 1, 4, window=7),
        Case("int8-token/int4-token", 12, 16, 2, 2, window=20),
        Case("int8", 16, 16, 2, 2),
    ]
    layers = [Layer(case, sequences=2) for case in cases]
    for layer in layers[1:]:
        for sequence, first in zip(layer.sequences, layers[0].sequences, strict=True):
            sequence.block_table = first.block_table
    for work in ([(0, 30), (1, 30)], [(1, 1), (0, 1)], [(0, 1), (1, 40)]):
        batch = Batch.build([(layers[0].sequences[i], n) for i, n in work], 16)
        for layer in layers:
            layer.step(work, batch)


def test_a_steps_groups_are_made_once_for_all_layers() -> None:
    layer = Layer(Case("int8"), sequences=3)
    layer.step([(0, 5), (1, 5), (2, 1)])
    batch = Batch.build([(layer.sequences[0], 1), (layer.sequences[1], 1), (layer.sequences[2], 2)], 16)
    groups = reference.groups(batch, 16)
    assert reference.groups(batch, 16) is groups
    assert [group.rows.tolist() for group in groups] == [[0, 1], [2, 3]]
    assert sorted(row for group in groups for row in group.rows.tolist()) == [0, 1, 2, 3]


def test_a_long_context_is_not_grouped_with_short_ones() -> None:
    """A group is computed up to its longest context, so mixing them would multiply the work of the short ones."""
    sequences = [Sequence([0] * 50, [0] * length, length - 1) for length in (800, 10, 700, 30)]
    groups = reference.groups(Batch.build([(sequence, 1) for sequence in sequences], 16), 16)
    assert [group.rows.tolist() for group in groups] == [[0, 2], [1, 3]]
    assert [group.longest for group in groups] == [800, 30]
