"""The engine on an NVIDIA GPU: graphs replayed, steps launched ahead, and nothing that waits for the device between."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from octavo.attention import backend_for
from octavo.cache.batch import Batch
from octavo.cache.plan import plan_layers
from octavo.cache.size import CacheSize
from octavo.cache.store import KVCache
from octavo.engine.engine import Engine
from octavo.engine.params import SamplingParams
from octavo.engine.sampling import choose
from octavo.engine.sequence import Sequence
from octavo.engine.warmup import LargestStep
from octavo.llm import LLM
from octavo.models.bind import BoundModel
from octavo.models.model import Model
from octavo.quant.format import KVFormat
from tests.engine.driving import drain, engine, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The bundled model in float32 on the GPU, without tf32: its tokens are the CPU's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield Model.load(device="cuda", dtype="float32")
    torch.backends.cuda.matmul.allow_tf32 = before


def serve(bound: BoundModel, kv: str = "int8-token", overlap: bool = True) -> Engine:
    """A capture that fails is an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decode steps run without CUDA graphs")
        plans = plan_layers(bound.shapes, KVFormat.parse(kv))
        layout = backend_for(plans).layout
        pages = CacheSize.of(bound.shapes, plans[0].format, layout.block_size).raw_pages(8)
        cache = KVCache(plans, 64, layout, pages)
        return Engine(bound, cache, 8, 256, overlap=overlap)


@pytest.mark.parametrize("kv", ["fp32", "int8-token", "int4-token", "kv8"])
def test_graphs_and_steps_ahead_give_the_tokens_of_plain_steps(model: Model, text_ids: list[int], kv: str):
    prompts = [text_ids[600 * i : 600 * i + length] for i, length in enumerate((5, 33, 64, 97, 150))]
    captured = serve(model.bound, kv)
    assert captured.runner.graphs is not None
    plain = serve(model.bound, kv, overlap=False)
    plain.runner.graphs = None
    expected = [s.output for s in run(plain, prompts, 24)]
    assert [s.output for s in run(captured, prompts, 24)] == expected


def test_tokens_are_those_of_the_cpu(model: Model, pamphlet: Model, text_ids: list[int]):
    prompts = [text_ids[:40], text_ids[700:790]]
    on_gpu = [s.output for s in run(serve(model.bound, "fp32"), prompts, 16)]
    assert on_gpu == [s.output for s in run(engine(pamphlet.bound, "fp32"), prompts, 16)]


def test_a_seed_draws_on_the_gpu_what_it_draws_on_a_cpu():
    sequences = [Sequence([1] * n, SamplingParams(temperature=1.0, seed=seed)) for n, seed in ((1, 0), (99, 2**64 - 1))]
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    cpu, gpu = (choose(logits.to(name), sequences).read() for name in ("cpu", "cuda"))
    assert [sampled.token for sampled in gpu] == [sampled.token for sampled in cpu]


def test_nothing_waits_for_the_device_between_two_decode_steps(model: Model, text_ids: list[int]):
    one = serve(model.bound)
    kinds = ({}, {"temperature": 1.0, "top_p": 0.9}, {"logprobs": 3})
    sequences = [Sequence(text_ids[:20], SamplingParams(max_tokens=50, **kind)) for kind in kinds]
    for sequence in sequences:
        one.add(sequence)
    one.step()
    work = [(sequence, 1) for sequence in sequences]
    batch = Batch.build(work, one.pool.block_size, one.launched.choice.tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        choose(one.runner.run(batch), sequences, ahead=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    drain(one)


def test_the_largest_step_is_measured_and_its_memory_given_back(model: Model):
    bound = model.bound
    plans = plan_layers(bound.shapes, KVFormat.parse("int8-token"))
    cache = KVCache(plans, 1, backend_for(plans).layout)
    LargestStep(4, 8, 200).run(bound, cache)  # libraries take their workspaces
    before = torch.cuda.memory_allocated()
    small, large = (LargestStep(4, tokens, 2000).nbytes(bound, cache) for tokens in (8, 4000))
    assert 0 < small < large
    wider = LargestStep(64, 64, 2000)
    assert wider.graph_nbytes(bound, cache) > 0
    assert torch.cuda.memory_allocated() - before < large


def test_the_cache_takes_its_share_of_what_the_largest_step_leaves(model: Model):
    llm = LLM(model, "int8-token", cache_max_entry_count=0.1, max_batch_size=4)
    free, total = torch.cuda.mem_get_info()
    assert 0.5 < llm.cache.nbytes / (0.1 * (free + llm.cache.nbytes)) < 1.1
    assert llm.cache.nbytes < total
