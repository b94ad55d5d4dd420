"""The Triton kernels against float64 attention over the decoded values of the same codes; codes bit for bit.

Where there is no GPU one test runs this file again, with test_cuda_edges.py, in a process of its own, in Triton's
interpreter: a kernel is interpreted or compiled for as long as its process lives. The interpreter shows that the
arithmetic and the indexing are right; that a GPU computes the same shows only on a GPU. It takes seconds for a hundred
rows, so make test leaves out the cases that are slow there.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import weakref
from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo import OctavoError
from octavo.attention import AttentionSpec, attend, backend_for, cuda
from octavo.attention.cuda.step import Step
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.row_store import RowStore
from octavo.cache.store import KVCache
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat
from tests.attention.test_reference import (
    HEADER,
    Case,
    Items,
    Layer,
    Sequence,
    assert_stored,
    numpy_attention,
    stored,
)
from tests.conftest import ranging, slow

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
AVAILABLE = cuda.unavailable() is None

kernels = pytest.mark.skipif(
    not AVAILABLE, reason=f"{cuda.unavailable()}: run in Triton's interpreter by one test here"
)
if not INTERPRETED:
    kernels = lambda test, skip=kernels: pytest.mark.gpu(skip(test))  # noqa: E731 - two marks as one


def quicken() -> None:
    """Triton's interpreter searches all of triton.language at every call of a device function, which takes most of its
    time. Once for each module is enough in a process that does nothing else with Triton. Most of the rest goes to the
    types of values, which it makes anew for each: one of a name is enough."""
    from triton.language import core
    from triton.runtime import interpreter

    patch, find_type, done = interpreter._patch_lang, interpreter._get_np_dtype, set[str]()
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    found: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def patch_once(function: Any) -> Any:
        if function.__module__ not in done:
            done.add(function.__module__)
            patch(function)
        return interpreter._LangPatchScope()  # with nothing to undo

    def find_type_once(kind: Any) -> Any:
        if kind.name not in found:
            found[kind.name] = find_type(kind)
        return found[kind.name]

    def make_block_once(self: Any, element: Any, shape: Any) -> None:
        key = (element.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            make_block(self, element, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def make_tensor_once(self: Any, handle: Any, kind: Any) -> None:
        if kind.name not in tensors:
            make_tensor(self, None, kind)
            tensors[kind.name] = dict(vars(self))
        vars(self).update(tensors[kind.name], handle=handle)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, find_type_once
    core.block_type.__init__, core.tensor.__init__ = make_block_once, make_tensor_once


if INTERPRETED:
    quicken()

# Of each row's norm: 15-bit queries and float16 weights, then the rounding of the answer itself.
CLOSE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 8e-3}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


CASES = [
    (Case("bf16", 64, 64, 2, 3, 64, window=33, softcap=20.0, sinks=True), BF16),
    (Case("int8", 80, 96, 1, 4, 64, softcap=5.0, place=2.0), BF16),
    (Case("fp8", 80, 64, 1, 3, 64, window=70), BF16),
    (Case("int8-token", 96, 80, 1, 3, 64, window=50, sinks=True, calibrated=False), FP32),
    (Case("int4-token/fp16", 96, 96, 1, 4, 64), FP16),
    *slow(
        (Case("int4-token", 80, 96, 1, 8, 64, softcap=5.0, sinks=True, place=3.0), FP32),
        (Case("fp16", 80, 80, 1, 4, 64), FP16),
        (Case("fp32", 96, 64, 1, 1, 64, sinks=True), FP32),
        (Case("bf16", 64, 64, 1, 1, 64), FP16),
        (Case("int8", 64, 64, 2, 3, 64), FP32),
        (Case("int8", 128, 128, 1, 8, 64, window=64), FP16),
        (Case("int8", 256, 256, 1, 1, 64, sinks=True, place=3.0), FP32),
        (Case("int8-token", 64, 64, 1, 1, 64, softcap=20.0), FP16),
        (Case("int8-token-unrotated", 80, 80, 1, 1, 64), FP32),
        (Case("int4-token", 64, 128, 2, 1, 64, calibrated=False), FP32),
        (Case("int4-token-unrotated", 256, 64, 1, 3, 64), BF16),
        (Case("int8-token/int4-token", 128, 80, 1, 4, 64, window=70), FP32),
        (Case("bf16/int4-token", 64, 64, 1, 3, 64, calibrated=False), BF16),
    ),
]


class PagedLayer(Layer):
    """The same layer with its cache in pages, on the device of the kernels."""

    def __init__(self, case: Case, sequences: int = 1, dtype: torch.dtype = FP32):
        super().__init__(case, sequences)
        self.dtype = dtype
        shape = replace(self.spec.shape, device=DEVICE)
        sinks = self.spec.sinks.to(DEVICE) if self.spec.sinks is not None else None
        self.spec = replace(self.spec, shape=shape, sinks=sinks)
        self.cache = self.empty_cache(self.cache.num_blocks, "pages")

    # What bfloat16 holds, so that storing it as such rounds nothing: the interpreter would cut, not round.
    def keys(self, rows: int) -> Tensor:
        return super().keys(rows).bfloat16().float()

    def values(self, rows: int) -> Tensor:
        return super().values(rows).bfloat16().float()

    def feed(self, work: Items[tuple[int, int]], q: Tensor, k: Tensor, v: Tensor, batch: Batch | None = None) -> Tensor:
        q, k, v = (x.to(DEVICE, self.dtype) for x in (q, k, v))
        out = super().feed(work, q, k, v, batch)
        assert torch.isfinite(out).all()
        return out

    def step(self, work: Items[tuple[int, int]], batch: Batch | None = None) -> Tensor:
        lengths = [n for _, n in work]
        q, k, v = self.queries(sum(lengths)), self.keys(sum(lengths)), self.values(sum(lengths))
        out = self.feed(work, q, k, v, batch)
        assert out.dtype == self.dtype
        for (i, _), queries, answers in zip(work, q.to(self.dtype).split(lengths), out.split(lengths), strict=True):
            self.compare(self.sequences[i], queries, answers)
        return out

    def compare(self, sequence: Sequence, q: Tensor, out: Tensor) -> None:
        layer, total = self.cache.layers[0], sequence.num_cached
        k, v = host(layer.k), host(layer.v)
        assert_stored(k, sequence, torch.cat(sequence.keys).cpu())
        assert_stored(v, sequence, torch.cat(sequence.values).cpu())
        expected = numpy_attention(
            self.spec, q.double().numpy(), stored(k, sequence), stored(v, sequence), total - len(q)
        )
        assert_close(out, expected)


def host(store: RowStore) -> RowStore:
    """A copy of the store in the host's memory."""
    twin = copy(store)
    twin.codes = store.codes.cpu()
    twin.scales = store.scales.cpu() if store.scales is not None else None
    twin.static = store.static.to(torch.device("cpu")) if store.static is not None else None
    return twin


def assert_close(out: Tensor, expected: np.ndarray) -> None:
    error = np.linalg.norm(out.double().cpu().numpy() - expected, axis=-1)
    assert (error <= CLOSE[out.dtype] * np.linalg.norm(expected, axis=-1) + 1e-6).all(), error.max()


@pytest.mark.skipif(AVAILABLE, reason="the kernels are tested directly")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_in_tritons_interpreter(which: str) -> None:
    pytest.importorskip("triton")
    files = [__file__, str(Path(__file__).with_name("test_cuda_edges.py"))]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},  # its products are too small to share
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]


@kernels
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_steps_are_plain_attention_over_the_decoded_cache(case: Case, dtype: torch.dtype) -> None:
    layer = PagedLayer(case, 3, dtype)
    layer.step([(0, 63), (1, 1), (2, 130)])
    layer.step([(0, 1), (1, 64), (2, 1)])  # 64, 65 and 131 tokens: two decodes, and a chunk over a prefix


@kernels
@pytest.mark.parametrize("name", ["int4-token", *slow("int8", "bf16")])
def test_a_long_tail_under_a_strong_first_token_keeps_its_weight(name: str) -> None:
    """12 nats above 8k others, which hold a twentieth of the weight; the context is split over programs."""
    tokens, dim = 8192, 32
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, 1, dim, generator=random).bfloat16().float() for n in (1, tokens, tokens))
    k[:] = 0
    k[0] = q[0] * 12 * dim**0.5 / (q[0] * q[0]).sum()
    k = k.bfloat16().float()
    v[1:] += 1
    shape, blocks = LayerShape(1, dim, dim, DEVICE), tokens // 64
    ranges = ranging(torch.full((1, dim), -9.0), torch.full((1, dim), 15.0))
    calibration = Calibration(HEADER, [{"k": ranges, "v": ranges}])
    cache = KVCache(plan_layers([shape], KVFormat.parse(name), calibration), blocks, Layout(order="pages"))
    sequence = Sequence(torch.randperm(blocks, generator=random).tolist(), [0] * tokens)
    slots = Batch.build([(sequence, tokens)], 64).slots
    cache.layers[0].write(k.to(DEVICE), v.to(DEVICE), slots.to(DEVICE))
    sequence.num_cached = tokens - 1
    spec = AttentionSpec(shape, 1, dim**-0.5)
    given = (x.to(DEVICE) for x in (q, k[-1:], v[-1:]))
    out = attend(spec, cache.layers[0], *given, Batch.build([(sequence, 1)], 64))
    sequence.num_cached = tokens
    keys, values = (stored(host(store), sequence) for store in cache.stores)
    assert_close(out, numpy_attention(spec, q.double().numpy(), keys, values, first=tokens - 1))


@kernels
@pytest.mark.parametrize("sinks", [False, *slow(True)])
def test_a_row_that_attends_to_nothing_is_zero(sinks: bool) -> None:
    layer = PagedLayer(Case("int8", block_size=64, place=3, sinks=sinks), 2)
    layer.step([(0, 20), (1, 20)])
    batch = Batch.build([(layer.sequences[0], 1), (layer.sequences[1], 1)], 64)
    batch.kv_len, batch.slots = torch.tensor([0, 20]), torch.tensor([-1, -1])
    q = layer.queries(2).to(DEVICE)
    before = [store.codes.clone() for store in layer.cache.stores]
    out = attend(layer.spec, layer.cache.layers[0], q, q[:, :2], q[:, :2], batch)
    assert not out[0].any()
    layer.compare(layer.sequences[1], q[1:].cpu(), out[1:])
    assert all(torch.equal(store.codes, old) for store, old in zip(layer.cache.stores, before, strict=True))


@kernels
@pytest.mark.parametrize("name", ["int8", *slow("fp8", "int8-token", "int4-token")])
def test_saturation_is_counted_as_the_specification_counts_it(name: str) -> None:
    """Of what is not a number too, whose codes are the specification's."""
    case = Case(name, block_size=64)
    layers = [Layer(case), PagedLayer(case)]
    q, k, v = layers[0].queries(40), layers[0].keys(40) * 3, layers[0].values(40) * 3
    k[3, 0, 5], k[4, 0, 7], v[5, 0, :] = 1e6, torch.nan, torch.nan
    for layer in layers:
        layer.calibration = layers[0].calibration
        layer.cache = layer.empty_cache(4, layer.cache.layout.order)
        layer.feed([(0, 40)], q, k, v)
    counts = [[(store.saturated.item(), store.written) for store in layer.cache.stores] for layer in layers]
    assert counts[0] == counts[1]
    assert min(saturated for saturated, _ in counts[0]) > 0
    blocks = torch.tensor([0])
    for one, two in zip(*(layer.cache.stores for layer in layers), strict=True):
        assert torch.equal(one.decode(blocks)[3:6], host(two).decode(blocks)[3:6])


@kernels
def test_rows_may_be_strided_as_models_hand_them_over() -> None:
    """[heads, tokens, dim] seen as [tokens, heads, dim], and as every second of a wider tensor."""
    case = Case("int8-token", kv_heads=2, group=2, block_size=64)
    answers = []
    for view in (
        lambda x: x,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, 2)[..., ::2],
    ):
        layer = PagedLayer(case)
        answers.append(layer.feed([(0, 20)], *map(view, (layer.queries(20), layer.keys(20), layer.values(20)))))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@kernels
def test_a_layer_that_shares_another_reads_its_cache_and_writes_none() -> None:
    layer = PagedLayer(Case("int8-token", block_size=64))
    shared = replace(layer.spec, shape=replace(layer.spec.shape, shares=0))
    batch = Batch.build([(layer.sequences[0], 25)], 64)
    q, k, v = (x.to(DEVICE) for x in (layer.queries(25), layer.keys(25), layer.values(25)))
    first = attend(layer.spec, layer.cache.layers[0], q, k, v, batch)
    nan = torch.full_like(k, torch.nan)
    assert torch.equal(attend(shared, layer.cache.layers[0], q, nan, nan, batch), first)


@kernels
@pytest.mark.parametrize("case", [Case("bf16", 64, 80, 1, 3, 64), *slow(Case("fp32", 64, 64, 1, 1, 64))], ids=str)
def test_nan_that_a_freed_block_held_reaches_no_row(case: Case) -> None:
    layer = PagedLayer(case, 2)
    for store in layer.cache.stores:
        store.codes.fill_(torch.nan)
    layer.step([(0, 1), (1, 70)])
    layer.step([(0, 66), (1, 1)])


@kernels
@pytest.mark.slow
def test_a_short_chunk_over_a_long_prefix_is_split_as_a_decode_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.attention.cuda import launch

    layer = PagedLayer(Case("int8", 64, 64, 1, 4, 64, sinks=True))
    layer.step([(0, 170)])
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)  # noqa: ARG005
    made = launch.layer_of(layer.spec, layer.cache.layers[0])
    made.chunk = replace(made.chunk, shortest=1)
    seen = sums(monkeypatch)
    layer.step([(0, 20)])  # of one tile
    assert seen[0].shape[3] == 4


@kernels
def test_a_decode_beside_a_chunk_takes_sums_for_its_own_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PagedLayer(Case("int8", block_size=64), 2)
    layer.step([(0, 3), (1, 3)])
    seen = sums(monkeypatch)
    layer.step([(0, 1), (1, 100)])
    decodes, chunks = seen
    assert decodes.shape[:2] == (1, 1)
    assert 100 <= chunks.shape[:2].numel() < 2 * 128


def sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The temporaries [tiles, queries, heads, splits, v_dim] of every scan from now on."""
    from octavo.attention.cuda import launch

    seen: list[Tensor] = []

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]):
            def run(*given, **constants):
                seen.append(given[kernel.arg_names.index("sums")])
                kernel[grid](*given, **constants)

            return run

    kernel = launch.scan
    monkeypatch.setattr(launch, "scan", Watched())
    return seen


@kernels
def test_a_cache_is_freed_when_it_is_let_go() -> None:
    """At once: what waits for the collector of cycles is tens of GiB on a GPU."""
    layer = PagedLayer(Case("int8-token", block_size=64))
    layer.step([(0, 3)])
    left = [weakref.ref(store.codes) for store in layer.cache.stores]
    gc.disable()
    try:
        del layer.cache
        assert [codes() for codes in left] == [None, None]
    finally:
        gc.enable()


def test_tiles_that_read_most_come_first() -> None:
    short, long = Sequence([0, 1], [0] * 100), Sequence(list(range(2, 12)), [0] * 520)
    short.num_cached, long.num_cached = 0, 500
    step = Step.of(Batch.build([(short, 100), (long, 20)], 64))
    assert step.tiles(64).tolist() == [[1, 0], [0, 64], [0, 0]]


@kernels
def test_the_operator_declares_what_it_writes() -> None:
    from octavo.attention.cuda.launch import layer_of

    layer = PagedLayer(Case("int8-token", block_size=64), 2)
    layer.step([(0, 20), (1, 9)])
    batch = Batch.build([(layer.sequences[0], 1), (layer.sequences[1], 3)], 64).on(DEVICE)
    q, k, v = (x.to(DEVICE) for x in (layer.queries(4), layer.keys(4), layer.values(4)))
    made, step = layer_of(layer.spec, layer.cache.layers[0]), Step.of(batch)
    given = (q, k, v, batch.slots, batch.block_table, step.q_start, step.kv_len)
    given += (step.tiles(1), step.tiles(made.chunk.queries), [], [], made.memory, made.number)
    torch.library.opcheck(torch.ops.octavo.attend.default, given, test_utils=("test_schema", "test_faketensor"))
    out = torch.ops.octavo.attend(*given)
    assert torch.equal(out, attend(layer.spec, layer.cache.layers[0], q, k, v, batch))
    body = torch.compile(
        lambda q, k, v: attend(layer.spec, layer.cache.layers[0], q * 1, k, v, batch) + 0,
        backend="aot_eager",
        fullgraph=True,
    )
    assert torch.equal(body(q, k, v), out)


def execute(assembly: str, codes: np.ndarray, outputs: int) -> list[np.ndarray]:
    """The registers $0 … of PTX over registers of four codes [n], uint32: the few instructions that codes.py uses."""
    registers = {f"${outputs}": codes}

    def value(name: str) -> np.ndarray:
        return np.full_like(codes, int(name, 0)) if name[0].isdigit() else registers[name]

    def halves(name: str) -> np.ndarray:
        return value(name).view(np.float16).reshape(-1, 2)

    for op, target, *given in re.findall(
        r" ([a-z][a-z.0-9]+) ([$\w]+), ([$\w]+)(?:, ([$\w]+))?(?:, ([$\w]+))?;", assembly
    ):
        a, *rest = (name for name in given if name)
        if op == "prmt.b32":
            source = np.stack([value(a), value(rest[0])], 1).view(np.uint8)
            picked = [source[:, int(rest[1], 0) >> 4 * i & 15] for i in range(4)]
            registers[target] = np.stack(picked, 1).copy().view(np.uint32)[:, 0]
        elif op == "sub.f16x2":
            registers[target] = (halves(a) - halves(rest[0])).copy().view(np.uint32)[:, 0]
        elif op == "fma.rn.f16x2":  # exact in float32, then rounded once
            fused = halves(a).astype(np.float32) * halves(rest[0]) + halves(rest[1])
            registers[target] = fused.astype(np.float16).view(np.uint32)[:, 0]
        elif op == "mov.b32":
            registers[target] = value(a)
        else:
            bitwise = {"and.b32": np.bitwise_and, "xor.b32": np.bitwise_xor, "shl.b32": np.left_shift,
                       "shr.b32": np.right_shift}  # fmt: skip
            registers[target] = bitwise[op](value(a), value(rest[0]))
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_assembly_converts_as_its_plain_form_does() -> None:
    """What neither the interpreter nor an offline compilation shows."""
    from octavo.attention.cuda import codes

    bytes_ = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), 16))
    registers = bytes_.view(np.uint32)
    for assembly, plain in (
        (codes.NUMBERS, bytes_.view(np.int8).astype(np.float16)),
        (codes.LOW_NUMBERS, (bytes_ & 15) - 7.5),
        (codes.HIGH_NUMBERS, (bytes_ >> 4) - 7.5),
    ):
        pairs = execute(assembly.value, registers, 2)
        assert (np.stack(pairs, 1).reshape(-1).view(np.float16) == plain).all()
    for assembly, plain in ((codes.LOW_NIBBLES, bytes_ & 15), (codes.HIGH_NIBBLES, bytes_ >> 4)):
        assert (execute(assembly.value, registers, 1)[0].view(np.int8) == plain).all()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="Triton is not installed, or interprets")
def test_the_decode_kernel_spills_no_registers() -> None:
    script = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"
    command = [sys.executable, script, "--formats", "int8", "--dims", "128", "--targets", "90", "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "wgmma" in run.stdout


def test_layouts_are_given_to_those_who_can_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (
        LayerShape(1, 64, 64, torch.device("cuda")),
        LayerShape(1, 64, 64),
        LayerShape(1, 512, 64, torch.device("cuda")),
    )
    on_gpu, on_cpu, wide = (plan_layers([shape], KVFormat.parse("int8-token")) for shape in shapes)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "too_old", lambda device: False)  # noqa: ARG005
    assert backend_for(on_gpu).name == "triton"
    assert backend_for(on_cpu).name != "triton"
    with pytest.warns(UserWarning, match="plain torch, which is slower: no kernel takes heads of 512 and 64"):
        assert backend_for(wide).name == "reference"
    monkeypatch.setattr(cuda, "unavailable", lambda: "there is no GPU")
    with pytest.warns(UserWarning, match="there is no GPU"):
        assert backend_for(on_gpu).name == "reference"
    monkeypatch.setenv("OCTAVO_ATTENTION", "triton")
    with pytest.raises(OctavoError, match="there is no GPU"):
        backend_for(on_gpu)
