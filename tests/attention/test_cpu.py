"""The native kernels against float64 attention over the decoded values of the same codes, for each instruction set.

The codes themselves must be those of the specification, bit for bit. Where the extension is not built (no compiler)
these tests are skipped; what then happens is tested too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from octavo import LLM, OctavoError, SamplingParams
from octavo.attention import AttentionSpec, attend, backend_for, cpu
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.store import KVCache
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat
from tests.attention.test_reference import (
    HEADER,
    Case,
    Layer,
    Sequence,
    assert_stored,
    check_the_next_owner,
    numpy_attention,
    rows_of,
    stored,
)
from tests.conftest import ranging

native = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ISAS = cpu.extension.isas or ["none"]
CLOSE = {True: 2e-5, False: 2e-4}  # of each row's norm: float32, rotated rows included; 15-bit queries, 16-bit weights

CASES = [
    Case("bf16", 64, 64, 2, 3, 64),
    Case("fp16", 80, 80, 1, 4, 64),
    Case("fp32", 96, 96, 2, 1, 64),
    Case("int8", 64, 64, 1, 8, 64),
    Case("int8", 80, 80, 2, 3, 64),
    Case("int8", 96, 128, 4, 1, 64),
    Case("int8", 128, 128, 2, 4, 64),
    Case("int8", 256, 256, 1, 3, 64),
    Case("fp8", 80, 40, 2, 3, 64),
    Case("fp8", 64, 64, 1, 1, 64, calibrated=False, window=50),
    Case("fp8/int8-token", 64, 64, 1, 4, 64, softcap=5.0, sinks=True, place=2.0),
    Case("int8-token", 64, 64, 2, 4, 64),
    Case("int8-token", 96, 96, 3, 1, 64, calibrated=False),
    Case("int8-token-unrotated", 80, 80, 2, 3, 64),
    Case("int4-token", 64, 64, 1, 3, 64, calibrated=False),
    Case("int4-token", 80, 80, 1, 8, 64),
    Case("int4-token", 128, 64, 2, 4, 64),
    Case("int4-token-unrotated", 256, 256, 1, 1, 64),
    Case("int8-token/int4-token", 128, 128, 1, 8, 64),
    Case("bf16/int4-token", 96, 96, 2, 3, 64),
    Case("int8", 64, 64, 2, 3, 64, window=50),
    Case("int4-token", 64, 64, 2, 3, 64, window=70),
    Case("int8", 64, 64, 2, 3, 64, softcap=5.0, place=2.0),
    Case("int8-token", 64, 64, 2, 3, 64, sinks=True),
    Case("int8", 64, 64, 2, 3, 64, window=33, softcap=20.0, sinks=True),
    Case("bf16", 64, 64, 2, 3, 64, window=33, softcap=20.0, sinks=True),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the test with each instruction set of this processor."""
    with cpu.extension.limited_to(request.param):
        yield


@pytest.fixture(params=[True, False], ids=["exact", "fastest"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test in float32, and by the products of bytes that newer processors have."""
    monkeypatch.setattr(cpu, "exact", request.param)


every_isa = pytest.mark.usefixtures("isa")
every_way = pytest.mark.usefixtures("isa", "arithmetic")


class NativeLayer(Layer):
    """The same layer with its cache in tiles."""

    def __init__(self, case: Case, sequences: int = 1, seed: int = 0):
        super().__init__(case, sequences, seed)
        self.cache = self.empty_cache(self.cache.num_blocks, "tiles")

    def compare(self, sequence: Sequence, q: torch.Tensor, out: torch.Tensor) -> None:
        layer, total = self.cache.layers[0], sequence.num_cached
        assert_stored(layer.k, sequence, torch.cat(sequence.keys))
        assert_stored(layer.v, sequence, torch.cat(sequence.values))
        keys, values = stored(layer.k, sequence), stored(layer.v, sequence)
        expected = numpy_attention(self.spec, q.double().numpy(), keys, values, first=total - len(q))
        assert_close(out, expected)


def assert_close(out: torch.Tensor, expected: np.ndarray) -> None:
    error = np.linalg.norm(out.double().numpy() - expected, axis=-1)
    assert (error <= CLOSE[cpu.exact] * np.linalg.norm(expected, axis=-1) + 3e-5).all(), error.max()


@every_way
@native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_plain_attention_over_the_decoded_cache(case: Case) -> None:
    layer = NativeLayer(case, sequences=3)
    layer.step([(0, 62), (1, 3), (2, 8)])
    for _ in range(4):  # over a block's edge: 62, 63, 64, 65, 66
        layer.step([(0, 1), (1, 1)])
    layer.step([(0, 1), (1, 70), (2, 2)])  # a chunk of a prompt among decodes
    layer.step([(2, 1), (1, 8), (0, 9)])


@every_way
@native
@pytest.mark.parametrize("name", ["int8", "int8-token", "int4-token", "bf16"])
def test_a_long_context_is_split_over_threads_and_joined(name: str) -> None:
    tokens, shape = 5000, LayerShape(1, 64, 64)
    layer = NativeLayer(Case(name, 64, 64, 1, 4, 64))
    cache = KVCache(plan_layers([shape], KVFormat.parse(name), layer.calibration), 79, Layout(order="tiles"))
    random = torch.Generator().manual_seed(0)
    sequence = Sequence(torch.randperm(79, generator=random).tolist(), [0] * tokens)
    q, k, v = (torch.randn(tokens, heads, 64, generator=random) for heads in (4, 1, 1))
    batch = Batch.build([(sequence, tokens)], 64)
    for store, x in zip(cache.stores, (k, v), strict=True):
        cpu.write(store, x, batch.slots)
    sequence.num_cached = tokens - 1
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    out = attend(layer.spec, cache.layers[0], q[-1:], k[-1:], v[-1:], Batch.build([(sequence, 1)], 64))
    torch.set_num_threads(before)
    sequence.num_cached = tokens
    keys, values = (stored(store, sequence) for store in cache.stores)
    assert_close(out, numpy_attention(layer.spec, q[-1:].double().numpy(), keys, values, first=tokens - 1))


@every_way
@native
@pytest.mark.parametrize("work", [[200], [150, 50], [199, 1]], ids=str)
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("name", ["bf16", "int8", "int8-token", "int4-token"])
def test_bf16_is_as_close_as_torchs_attention_on_the_decoded_values(
    name: str, window: int | None, work: list[int]
) -> None:
    layer = NativeLayer(Case(name, 64, 64, 2, 4, 64, window=window))
    sequence, store = layer.sequences[0], layer.cache.layers[0]
    for n in work:
        q, k, v = (x.bfloat16() for x in (layer.queries(n), layer.keys(n), layer.values(n)))
        out = layer.feed([(0, n)], q, k, v)
    keys, values = (stored(side, sequence) for side in (store.k, store.v))
    past = sequence.num_cached - n
    position, key = torch.arange(past, past + n)[:, None], torch.arange(past + n)
    seen = (key <= position) & (key > position - (window or len(key)))
    rows = (x.transpose(0, 1)[None] for x in (q, *(torch.from_numpy(x).bfloat16() for x in (keys, values))))
    torchs = F.scaled_dot_product_attention(*rows, attn_mask=seen, scale=layer.spec.scale, enable_gqa=True)
    expected = numpy_attention(layer.spec, q.double().numpy(), keys, values, first=past)
    own, allowed = (np.linalg.norm(x.double().numpy() - expected) for x in (out, torchs[0].transpose(0, 1)))
    assert own <= 1.5 * allowed


@dataclass
class Session(Sequence):
    """A sequence with raw pages."""

    first_page: int = 0
    ring: int = 0


class Alone:
    """A prompt's rows, and its answers however it is cut and whoever shares its steps."""

    def __init__(self, case: Case, tokens: int = 1300):
        self.layer = NativeLayer(case)
        self.tokens, self.blocks = tokens, -(-tokens // 64)
        layer = self.layer
        self.rows = [layer.queries(tokens), layer.keys(tokens), layer.values(tokens)]
        self.others = [layer.queries(tokens), layer.keys(tokens), layer.values(tokens)]

    def answers(self, cuts: list[int], company: list[int]) -> torch.Tensor:
        """Of the prompt cut so; beside each piece another sequence computes so many tokens."""
        shape, format = self.layer.spec.shape, KVFormat.parse(self.layer.case.format)
        plans = plan_layers([shape], format, self.layer.calibration)
        ring = format.edges // 64
        self.cache = KVCache(plans, 2 * self.blocks, Layout(order="tiles"), 2 + 2 * ring)
        order = torch.randperm(2 * self.blocks, generator=torch.Generator().manual_seed(len(cuts))).tolist()
        tables, zeros = (order[: self.blocks], order[self.blocks :]), [0] * self.tokens
        self.own, other = (Session(table, zeros, first_page=i, ring=2 + i * ring) for i, table in enumerate(tables))
        outs = []
        for n, more in zip(cuts, company, strict=True):
            work = [(self.own, n), (other, more)] if more else [(self.own, n)]
            pieces = [
                rows[sequence.num_cached :][:count]
                for (sequence, count), whole in zip(work, (self.rows, self.others), strict=False)
                for rows in whole
            ]
            q, k, v = (torch.cat(pieces[i::3]) for i in range(3))
            batch = Batch.build(work, 64, span=format.edges)
            outs.append(attend(self.layer.spec, self.cache.layers[0], q, k, v, batch)[:n])
            for sequence, count in work:
                sequence.num_cached += count
        return torch.cat(outs)


@every_isa
@native
@pytest.mark.parametrize(
    "case",
    [
        Case("bf16", 64, 64, 1, 4, 64),
        Case("fp16", 80, 80, 1, 3, 64),
        Case("int8", 64, 64, 2, 1, 64, sinks=True),
        Case("int8-token", 128, 128, 1, 3, 64),
        Case("int8-token-unrotated", 24, 40, 2, 3, 64, window=100),
        Case("int4-token", 64, 128, 1, 7, 64),
        Case("int8-token/int4-token", 96, 96, 2, 2, 64, window=700, softcap=20.0, sinks=True),
        Case("kv8", 64, 64, 1, 3, 64),
        Case("fp8+edges", 64, 64, 1, 3, 64),
        Case("int8+edges256", 64, 64, 1, 1, 64),
        Case("k8v4+edges128", 96, 40, 1, 4, 64, window=300, softcap=20.0, sinks=True),
    ],
    ids=str,
)
def test_a_rows_bits_do_not_depend_on_its_company(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a prompt is cut, whoever shares the step, and whatever the number of threads."""
    monkeypatch.setattr(cpu, "exact", True)
    prompt = Alone(case)

    def answers(threads: int, cuts: list[int], company: list[int]) -> torch.Tensor:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return prompt.answers(cuts, company)

    whole = answers(1, [1300], [0])
    assert torch.equal(answers(2, [64] * 20 + [20], [0] * 21), whole)
    assert torch.equal(answers(3, [1000] + [1] * 40 + [2, 3, 5, 7] * 15 + [5], [900] + [1] * 101), whole)
    assert torch.equal(answers(16, [700, 1, 1, 598], [1, 63, 700, 1]), whole)
    assert torch.equal(answers(5, [65] * 20, [130, 2] * 5 + [0] * 10), whole)


@every_way
@native
@pytest.mark.parametrize(
    "case",
    [
        Case("kv8", 64, 64, 1, 3, 64),
        Case("kv4", 64, 128, 1, 2, 64, window=90),
        Case("int8+edges128", 64, 64, 2, 1, 64, sinks=True),
        Case("k8v4+edges256", 96, 40, 1, 4, 64, window=300, softcap=20.0, sinks=True),
        Case("bf16/int4-token+edges", 64, 64, 1, 2, 64, calibrated=False),
    ],
    ids=str,
)
def test_a_query_reads_page_0_and_its_own_span_raw(case: Case) -> None:
    """Against a loop over rows, each of which attends to raw rows and decoded ones side by side."""
    prompt = Alone(case, 400)
    out = prompt.answers([150, 1, 1, 130, 70, 48], [3, 1, 64, 0, 1, 2])
    layer, span = prompt.cache.layers[0], KVFormat.parse(case.format).edges
    q, *rows = (x.double().numpy() for x in prompt.rows)
    decoded = [stored(store, prompt.own) for store in (layer.k, layer.v)]
    for t in range(400):
        positions = np.arange(t + 1)[:, None, None]
        raw = (positions < 64) | (positions >= t // span * span)
        seen = [np.where(raw, exact[: t + 1], codes[: t + 1]) for exact, codes in zip(rows, decoded, strict=True)]
        expected = numpy_attention(prompt.layer.spec, q[t : t + 1], *seen, first=t)
        assert_close(out[t : t + 1], expected)


def adversarial(kind: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [1, 2, 64], k and v [tokens, 1, 64] of a case that breaks careless kernels."""
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, h, 64, generator=random) for n, h in ((1, 2), (tokens, 1), (tokens, 1)))
    if kind == "one huge logit":
        k[tokens // 2] = 40 * q[0, 0]
    elif kind == "all logits equal":
        k[:] = k[0]
    elif kind == "a sink 12 nats above the tail":  # the tail of 32k tokens holds a sixth of the weight
        k[:] = 0.0
        k[0] = q[0, 0] * 12 * 8 / (q[0, 0] @ q[0, 0])
        v[1:] += 1.0
    elif kind == "constant rows":
        k[:], v[:] = 0.5, -0.25
    elif kind == "rows of zeros":
        q[:], k[:], v[:] = 0, 0, 0
    elif kind == "far outside the range":
        k, v = k * 5, v * 100
    return q, k, v


@every_way
@native
@pytest.mark.parametrize("name", ["int8", "int8-token", "int4-token", "bf16"])
@pytest.mark.parametrize(
    "kind",
    [
        "one huge logit",
        "all logits equal",
        "a sink 12 nats above the tail",
        "constant rows",
        "rows of zeros",
        "far outside the range",
    ],
)
def test_adversarial_rows_stay_close(name: str, kind: str) -> None:
    tokens = 32768 if "sink" in kind else 500
    q, k, v = adversarial(kind, tokens)
    shape, blocks = LayerShape(1, 64, 64), -(-tokens // 64)
    ranges = ranging(torch.full((1, 64), -5.0), torch.full((1, 64), 13.0))
    calibration = Calibration(HEADER, [{"k": ranges, "v": ranges}])
    cache = KVCache(plan_layers([shape], KVFormat.parse(name), calibration), blocks, Layout(order="tiles"))
    sequence = Sequence(list(range(blocks)), [0] * tokens, tokens - 1)
    whole = Batch.build([(Sequence(sequence.block_table, sequence.tokens), tokens)], 64)
    for store, x in zip(cache.stores, (k, v), strict=True):
        cpu.write(store, x, whole.slots)
    spec = AttentionSpec(shape, 2, 0.125)
    out = attend(spec, cache.layers[0], q, k[-1:], v[-1:], Batch.build([(sequence, 1)], 64))
    sequence.num_cached = tokens
    keys, values = (stored(store, sequence) for store in cache.stores)
    assert_close(out, numpy_attention(spec, q.double().numpy(), keys, values, first=tokens - 1))
    assert torch.isfinite(out).all()


@every_isa
@native
@pytest.mark.parametrize("name", ["int8", "fp8", "int8-token", "int4-token"])
def test_saturation_is_counted_as_the_specification_counts_it(name: str) -> None:
    """Of what is not a number too."""
    layers = [kind(Case(name, block_size=64)) for kind in (Layer, NativeLayer)]
    for layer in layers:
        q, k, v = layer.queries(40), layer.keys(40) * 3, layer.values(40) * 3
        k[3, 0, 5], k[4, 0, 7], v[5, 0, :] = 1e6, torch.nan, torch.nan
        layer.feed([(0, 40)], q, k, v)
    counts = [[(store.saturated.item(), store.written) for store in layer.cache.stores] for layer in layers]
    assert counts[0] == counts[1]
    assert name == "int4-token" or counts[0][0][0] > 0


@every_isa
@native
def test_bf16_and_strided_rows_are_encoded_as_their_float_values() -> None:
    shape = LayerShape(2, 64, 64)
    cache = KVCache(plan_layers([shape], KVFormat.parse("int8-token")), 1, Layout(order="tiles"))
    x = torch.randn(2, 10, 64).bfloat16().transpose(0, 1)  # as a model hands it over: [tokens, heads, dim], strided
    sequence = Sequence([0], [0] * 10, 10)
    cpu.write(cache.stores[0], x, torch.arange(10))
    assert_stored(cache.stores[0], sequence, x.contiguous())
    apart = torch.stack([x.float(), torch.zeros(10, 2, 64)], -1).flatten(-2)[..., ::2]
    cpu.write(cache.stores[1], apart, torch.arange(10))
    assert torch.equal(rows_of(cache.stores[0], sequence).scales, rows_of(cache.stores[1], sequence).scales)


@native
def test_what_lies_beyond_the_cache_is_refused() -> None:
    """Slots and blocks that it does not have, rows of other heads, and numbers of another type."""
    layer = NativeLayer(Case("int8-token", 64, 64, 2, 2, 64))
    q, k, v = layer.queries(5), layer.keys(5), layer.values(5)
    store, blocks = layer.cache.stores[0], layer.cache.num_blocks
    batch = Batch.build([(layer.sequences[0], 5)], 64)
    far = torch.full((5,), 64 * blocks)
    wrong = [
        lambda: cpu.write(store, k, far),
        lambda: cpu.write(store, k, torch.arange(5, dtype=torch.int32)),
        lambda: cpu.write(store, k[:, :1], torch.arange(5)),
        lambda: layer.feed([(0, 5)], q[:, :3], k, v),
        lambda: layer.feed([(0, 5)], q, k[:4], v),
        lambda: layer.feed([(0, 5)], q, k, v, replace(batch, slots=far, plan={})),
        lambda: layer.feed([(0, 5)], q, k, v, replace(batch, block_table=batch.block_table + blocks, plan={})),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="the native kernels expect"):
            call()


@every_isa
@native
def test_a_negative_slot_writes_nowhere() -> None:
    cache = KVCache(plan_layers([LayerShape(1, 64, 64)], KVFormat.parse("bf16")), 2, Layout(order="tiles"))
    cpu.write(cache.stores[0], torch.ones(3, 1, 64), torch.tensor([-1, 70, -1]))
    assert cache.stores[0].codes.float().sum() == cache.stores[0].written == 64


@native
def test_blocks_of_another_size_are_refused() -> None:
    cache = KVCache(plan_layers([LayerShape(1, 64, 64)], KVFormat.parse("bf16")), 2, Layout(4, "tiles"))
    with pytest.raises(ValueError, match="blocks of 4 tokens"):
        cpu.write(cache.stores[0], torch.ones(1, 1, 64), torch.tensor([0]))


@every_way
@native
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_a_block_tells_its_next_owner_nothing(name: str) -> None:
    check_the_next_owner(NativeLayer, name)


@pytest.mark.usefixtures("arithmetic")
@native
def test_no_native_kernel_reads_beyond_its_memory_in_random_shapes() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        k_dim, v_dim = (8 * int(n) for n in random.integers(1, 33, 2))
        name = random.choice(
            ["bf16", "fp16", "fp32", "fp8", "int8-token", "int4-token", "int8-token/int4-token", "int8-token-unrotated"]
        )
        kv_heads, group, blocks = (int(n) for n in random.integers(1, 5, 3))
        shape = LayerShape(kv_heads, k_dim, v_dim)
        cache = KVCache(plan_layers([shape], KVFormat.parse(str(name))), blocks, Layout(order="tiles"))
        tokens = int(random.integers(1, 64 * blocks + 1))
        sequence = Sequence(random.permutation(blocks).tolist(), [0] * tokens)
        new = int(min(tokens, random.integers(1, 12)))
        spec = AttentionSpec(shape, kv_heads * group, k_dim**-0.5, window=int(random.integers(1, 100)))
        for n in (tokens - new, new):
            if n:
                q, k, v = (
                    torch.randn(n, h, d) for h, d in ((kv_heads * group, k_dim), (kv_heads, k_dim), (kv_heads, v_dim))
                )
                k[0, 0, 0] = random.choice([0.0, np.nan, np.inf, 1e30])
                attend(spec, cache.layers[0], q, k, v, Batch.build([(sequence, n)], 64))
                sequence.num_cached += n


@native
def test_the_greedy_text_is_that_of_the_reference(pamphlet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["Once upon a time", "The old sailor looked at the sea and " * 20]
    texts = []
    for implementation in ("native", "reference"):
        monkeypatch.setenv("OCTAVO_ATTENTION", implementation)
        llm = LLM(pamphlet, kv="int8-token")
        assert llm.cache.layout.order == ("tiles" if implementation == "native" else "rows")
        texts.append([out.text for out in llm.generate(prompts, SamplingParams(max_tokens=48))])
    assert texts[0] == texts[1]


def test_without_the_extension_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "the native extension is not built")
    plans = plan_layers([LayerShape(1, 64, 64)], KVFormat.parse("int8-token"))
    assert backend_for(plans).name == "reference"
    monkeypatch.setenv("OCTAVO_ATTENTION", "native")
    with pytest.raises(OctavoError, match="not built"):
        backend_for(plans)


@native
def test_a_shape_without_a_kernel_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    even, odd = (plan_layers([LayerShape(1, dim, 64)], KVFormat.parse("int8-token")) for dim in (64, 60))
    assert backend_for(even).name == "native"
    assert backend_for(odd).name == "reference"
    monkeypatch.setenv("OCTAVO_ATTENTION", "native")
    with pytest.raises(OctavoError, match="heads of 60 and 64"):
        backend_for(odd)
    monkeypatch.setenv("OCTAVO_ATTENTION", "fast")
    with pytest.raises(OctavoError, match="reference, native or triton"):
        backend_for(even)
