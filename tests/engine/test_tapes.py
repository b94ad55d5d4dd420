"""Recorded decode steps: they give what the steps give, bit for bit, and what cannot be recorded is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.attention import cpu
from octavo.cache.batch import Batch
from octavo.engine import tapes
from octavo.engine.engine import Engine
from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.engine.tapes import DecodeTapes, Recorder
from octavo.models.bind import BoundModel
from octavo.models.model import Model
from tests.engine.driving import drain, engine
from tests.models import zoo

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")

LENGTHS = (70, 3, 130, 40)


def made(name: str) -> BoundModel:
    dense = {"num_local_experts": 0, "num_experts_per_tok": 0} if name == "granitemoehybrid" else {}
    return Model.of(zoo.build(name, max_position_embeddings=512, **dense), Path(name)).bound


def tapes_of(made: Engine) -> DecodeTapes:
    assert isinstance(made.runner.graphs, DecodeTapes)
    return made.runner.graphs


def answers(made: Engine) -> list[Sequence]:
    """Of requests that end at different times, so that steps of four rows, three, two and one come."""
    found = []
    for i, length in enumerate(LENGTHS):
        params = SamplingParams(max_tokens=6 + 3 * i, logprobs=2, temperature=i % 2, seed=i, ignore_eos=True)
        found.append(Sequence([3 + (7 * i + j * j) % 90 for j in range(length)], params))
        made.add(found[-1])
    drain(made)
    return found


@pytest.mark.parametrize(
    ("name", "kv"),
    [("llama", "kv8"), ("gemma2", "int8-token"), ("mixtral", "fp32"), ("mamba2", "fp32"), ("qwen3_5_text", "kv8"),
     ("granitemoehybrid", "fp32"), ("lfm2", "k8v4"), ("falcon_h1", "kv4")],
)  # fmt: skip
def test_a_recorded_step_gives_what_the_step_gives_bit_for_bit(name: str, kv: str) -> None:
    """The answers, and what is counted of the values written."""
    model = made(name)
    recorded, plain = (engine(model, kv, layout=cpu.BACKEND.layout) for _ in range(2))
    plain.runner.graphs = None
    assert [one.sampled for one in answers(recorded)] == [one.sampled for one in answers(plain)]
    assert tapes_of(recorded).refused is None
    assert tapes_of(recorded).tapes.keys() == {1, 2, 3, 4}
    assert [store.written for store in recorded.cache.stores] == [store.written for store in plain.cache.stores]


def test_a_replayed_step_that_names_blocks_that_are_not_there_is_refused() -> None:
    """Native calls are made again past the Python that checks shapes: where rows lie is checked within them."""
    recorded = engine(made("llama"), "fp32", layout=cpu.BACKEND.layout)
    answers(recorded)
    lost = Sequence([3, 4], SamplingParams())
    lost.num_cached, lost.tables = 1, [[recorded.cache.num_blocks]]
    batch = Batch.build([(lost, 1)], 64)
    assert 1 in tapes_of(recorded).tapes
    assert recorded.runner.graphs.takes(batch)
    with pytest.raises(ValueError, match="the native kernels expect tables of blocks that there are"):
        recorded.runner.run(batch)


def test_a_step_that_looks_at_values_on_the_host_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    norm = model.hf.model.norm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) if x.sum().item() else x)
    recorded, plain = (engine(model, "fp32", layout=cpu.BACKEND.layout) for _ in range(2))
    plain.runner.graphs = None
    assert [one.sampled for one in answers(recorded)] == [one.sampled for one in answers(plain)]
    assert "looks at values on the host" in str(tapes_of(recorded).refused)
    assert not tapes_of(recorded).tapes


def test_a_hook_that_comes_later_is_called() -> None:
    model = made("llama")
    recorded = engine(model, "fp32", layout=cpu.BACKEND.layout)
    answers(recorded)
    called: list[torch.nn.Module] = []
    hook = model.hf.get_output_embeddings().register_forward_hook(lambda module, *_: called.append(module))
    answers(recorded)
    hook.remove()
    assert len(called) > 12
    assert not tapes_of(recorded).tapes


def test_tapes_take_no_more_memory_than_there_is_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones stay."""
    model = made("llama")
    recorded = engine(model, "fp32", layout=cpu.BACKEND.layout, hits=False)
    answers(recorded)
    whole = tapes_of(recorded).nbytes
    monkeypatch.setattr(tapes, "ROOM", whole // 2)
    small = engine(model, "fp32", layout=cpu.BACKEND.layout, hits=False)
    assert [one.sampled for one in answers(small)] == [one.sampled for one in answers(recorded)]
    assert 0 < tapes_of(small).nbytes <= whole // 2


@pytest.mark.parametrize(
    "looks",
    [
        lambda x: x * 2 if torch.is_nonzero(x[0]) else x,
        lambda x: x * max(x[0], x[1]),
        lambda x: torch.where(x > 0)[0],
        lambda x: x.narrow(0, x[0].long() % 3, 1),
        lambda x: torch.repeat_interleave(x, x.long().abs() % 3),
        lambda x: x[: x.argmax()],
        lambda x: torch.zeros(4).add_(x) if x.tolist() else x,
        lambda x: torch.tensor([0.0, 0.0, 0.0, 0.0]).add_(x),  # a literal that would grow from step to step
    ],
)
@torch.inference_mode()
def test_an_operation_whose_replay_would_differ_is_refused(looks: Callable[[Tensor], Tensor]) -> None:
    class Model:
        hf = torch.nn.Linear(1, 1)

    recorder = Recorder(Model())  # type: ignore[arg-type]
    with recorder:
        looks(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert recorder.refused


def test_a_hook_of_all_modules_is_called_in_every_step() -> None:
    model = made("llama")
    llm = engine(model, "fp32", layout=cpu.BACKEND.layout)
    answers(llm)
    assert tapes_of(llm).tapes
    called: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(type(module).__name__)
    )
    try:
        answers(llm)
    finally:
        handle.remove()
    assert called.count("LlamaDecoderLayer") % len(model.layers) == 0
    assert called.count("LlamaMLP") == called.count("LlamaDecoderLayer") > 0
