"""Padded decode steps in fixed buffers, run as they are for want of a GPU: what a graph would replay."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch

from octavo.attention import reference
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import plan_layers
from octavo.cache.store import KVCache
from octavo.engine.graphs import NotCapturable, StepBuffers, cuda_capture, sizes
from octavo.engine.runner import Runner
from octavo.models.bind import BoundModel
from octavo.quant.format import KVFormat

SIZE = 4  # tokens of a block
CPU = torch.device("cpu")


@dataclass
class Session:
    tokens: list[int]
    num_cached: int
    block_table: list[int]

    @property
    def tables(self) -> list[list[int]]:
        return [self.block_table]


def sessions(count: int) -> list[Session]:
    """Of different lengths, each in three blocks of its own, the last token of each to be computed."""
    return [Session([i + 1] * (3 + i % 9), 2 + i % 9, [3 * i + 2, 3 * i, 3 * i + 1]) for i in range(count)]


def runner(model: BoundModel, kv: str, order: str) -> Runner:
    """On a cache of random codes."""
    cache = KVCache(plan_layers(model.shapes, KVFormat.parse(kv)), 40, Layout(SIZE, order))
    slots = torch.arange(40 * SIZE)
    draw = torch.Generator().manual_seed(0)
    for store in cache.stores:
        store.write(torch.randn(len(slots), store.heads, store.dim, generator=draw), slots)
    return Runner(model, cache)


def contents(runner: Runner) -> list[torch.Tensor]:
    blocks = torch.arange(runner.cache.num_blocks)
    return [store.layout.read_rows(store.codes, blocks).clone() for store in runner.cache.stores]


def test_sizes_are_1_2_4_then_eights_up_to_the_largest_batch():
    assert sizes(1) == [1]
    assert sizes(3) == [1, 2, 3]
    assert sizes(16) == [1, 2, 4, 8, 16]
    assert sizes(20) == [1, 2, 4, 8, 16, 20]
    assert sizes(48) == [1, 2, 4, 8, 16, 24, 32, 40, 48]


@pytest.mark.parametrize("order", ["rows", "tiles", "pages"])
@pytest.mark.parametrize("kv", ["fp32", "int8-token", "int4-token"])
@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_a_padded_step_computes_and_writes_what_the_step_does_and_nothing_else(
    llama: BoundModel, kv: str, order: str, count: int, monkeypatch: pytest.MonkeyPatch
):
    def attend(spec, cache, q, k, v, batch):  # the reference, whatever the layout
        cache.write(k, v, batch.slots)
        return reference.read(spec, cache, q, batch)

    monkeypatch.setattr("octavo.models.bound.attend", attend)
    plain, padded = runner(llama, kv, order), runner(llama, kv, order)
    untouched = contents(plain)
    padded.capture(12, 4 * SIZE, how=lambda run: run)
    batch = Batch.build([(session, 1) for session in sessions(count)], SIZE)
    torch.testing.assert_close(padded.run(batch), plain.run(batch), atol=1e-5, rtol=1e-5)
    for before, ours, expected in zip(untouched, contents(padded), contents(plain), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)  # sums of other lengths
        changed = (ours != before).any(-1).any(0).nonzero().flatten().tolist()
        assert set(changed) <= set(batch.slots.tolist())
        assert changed


def test_a_padded_row_counts_no_values_and_no_saturation(llama: BoundModel):
    one = runner(llama, "int8-token-unrotated", "rows")
    store = one.cache.stores[0]
    written, saturated = store.written, store.saturated.item()
    rows = torch.full((3, store.heads, store.dim), 1e9)
    store.write(rows, torch.tensor([5, -1, -1]))
    assert store.written - written == store.heads * store.dim
    assert store.saturated.item() - saturated == store.heads * store.dim


def test_buffers_stay_where_they_are_and_are_padded_anew_in_every_step():
    buffers = StepBuffers(8, 5, SIZE, CPU)
    views = buffers.batch(4)
    address = views.ids.data_ptr()
    buffers.load(Batch.build([(session, 1) for session in sessions(4)], SIZE), 4)
    batch = Batch.build([(session, 1) for session in sessions(2)[::-1]], SIZE)
    buffers.load(batch, 4)
    assert views.ids.data_ptr() == address
    assert views.ids.tolist() == [2, 1, 0, 0]
    assert views.positions.tolist() == [*batch.positions.tolist(), 0, 0]
    assert views.slots.tolist() == [*batch.slots.tolist(), -1, -1]
    assert views.kv_len.tolist() == [4, 3, 0, 0]
    assert views.block_table.tolist() == [[5, 3, 4, 0, 0], [2, 0, 1, 0, 0], [0] * 5, [0] * 5]
    assert views.q_start.tolist() == [0, 1, 2, 3, 4]
    assert views.logits_at.tolist() == [0, 1, 2, 3]
    assert max(views.kv_lens) == 20  # an upper bound, whatever step lies here


def test_only_decode_steps_of_the_captured_sizes_are_replayed(llama: BoundModel):
    one = runner(llama, "fp32", "rows")
    one.capture(4, 4 * SIZE, how=lambda run: run)
    takes = one.graphs.takes
    assert takes(Batch.build([(session, 1) for session in sessions(4)], SIZE))
    assert not takes(Batch.build([(session, 1) for session in sessions(5)], SIZE)), "more than were captured"
    chunk = Session([1] * 6, 2, [0, 1])
    assert not takes(Batch.build([(*sessions(1), 1), (chunk, 2)], SIZE)), "a part of a prompt"
    assert not takes(Batch.build([(*sessions(1), 1), (chunk, 1)], SIZE)), "a prompt's token that owes no logits"
    assert not takes(Batch.build([(Session([1] * 6, 5, [0] * 9), 1)], SIZE)), "a longer table"


def test_a_model_that_cannot_be_captured_runs_on_and_the_reason_is_given_once(llama: BoundModel):
    one = runner(llama, "fp32", "rows")

    def fails(_):
        raise NotCapturable("called a synchronizing CUDA operation")

    with pytest.warns(UserWarning, match="without CUDA graphs, which is slower: called a synchronizing") as said:
        one.capture(4, 16, how=fails)
    assert len(said) == 1
    assert one.graphs is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one.run(Batch.build([(session, 1) for session in sessions(2)], SIZE)).shape == (2, 64)


def test_an_error_of_the_model_is_no_reason_to_run_on(llama: BoundModel):
    def fails(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        runner(llama, "fp32", "rows").capture(4, 16, how=fails)


def test_the_reference_is_never_captured(llama: BoundModel):
    """It looks at lengths on the host: a graph would keep those of the captured step for ever."""
    with pytest.warns(UserWarning, match="attention runs on plain torch"):
        runner(llama, "fp32", "rows").capture(4, 16)


class FakeCuda:
    """Of torch.cuda what a capture uses, on a machine without a GPU. `fails` is what CUDA says within a capture."""

    def __init__(self, fails: Exception | None):
        self.fails, self.streams, self.capturing = fails, [], False

    def graph_pool_handle(self) -> int:
        return 1

    def Stream(self, device: torch.device) -> FakeCuda:
        self.streams.append(device)
        return self

    def wait_stream(self, other: object) -> None:
        assert other is not None

    def current_stream(self, device: torch.device) -> torch.device:
        return device

    def synchronize(self, device: torch.device) -> None:
        assert device.index == 1

    def device(self, device: torch.device) -> AbstractContextManager[None]:
        assert device.index == 1
        return nullcontext()

    def stream(self, stream: FakeCuda) -> AbstractContextManager[None]:
        assert stream is self
        return nullcontext()

    def CUDAGraph(self) -> FakeCuda:
        return self

    def replay(self) -> None:
        pass

    @contextmanager
    def graph(self, graph: FakeCuda, *, pool: int, stream: FakeCuda, capture_error_mode: str) -> Iterator[None]:
        assert (graph, pool, stream, capture_error_mode) == (self, 1, self, "thread_local")
        self.capturing = True
        try:
            yield
            if self.fails is not None:
                raise self.fails
        finally:
            self.capturing = False


@pytest.mark.parametrize("fails", [RuntimeError("operation not permitted when stream is capturing"), ValueError()])
def test_whatever_fails_within_a_capture_is_a_reason_to_run_without_graphs(
    fails: Exception, monkeypatch: pytest.MonkeyPatch
):
    cuda = FakeCuda(fails)
    monkeypatch.setattr(torch, "cuda", cuda)
    capture = cuda_capture(torch.device("cuda", 1))
    with pytest.raises(NotCapturable, match="not permitted" if str(fails) else "ValueError"):
        capture(lambda: torch.zeros(1))


def test_a_step_that_fails_outside_a_capture_fails_by_its_own_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "cuda", FakeCuda(None))

    def step() -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        cuda_capture(torch.device("cuda", 1))(step)


def test_all_captures_of_an_engine_are_on_one_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda(None)
    monkeypatch.setattr(torch, "cuda", cuda)
    capture = cuda_capture(torch.device("cuda", 1))
    for size in (4, 2):
        assert capture(lambda size=size: torch.zeros(size))().shape == (size,)
    assert cuda.streams == [torch.device("cuda", 1)]


def test_tables_of_captured_steps_are_no_longer_than_the_cache(llama: BoundModel):
    """A context of a million tokens would make them of a size that no cache needs."""
    one = runner(llama, "fp32", "rows")
    one.capture(4, 1 << 20, how=lambda run: run)
    assert one.graphs.buffers.width == one.cache.num_blocks
