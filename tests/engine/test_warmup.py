"""Before serving on a GPU: the largest step is the largest, and no kernel is compiled after those of the warm-up.

Bytes are measured on a GPU alone. Which kernels would be compiled shows without one: launches are recorded.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from octavo.attention import AttentionSpec
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.store import KVCache
from octavo.engine.sequence import Sequence
from octavo.engine.warmup import LargestStep
from octavo.models.bind import BoundModel
from octavo.quant.format import KVFormat


@pytest.mark.parametrize(
    ("sequences", "tokens", "session_len", "lengths"),
    [
        (1, 100, 60, [60]),
        (3, 100, 60, [60, 39, 1]),
        (4, 4, 60, [1, 1, 1, 1]),
        (3, 100, 20, [20, 20, 20]),
        (2, 1, 20, [1, 1]),
    ],
)
def test_one_prompt_is_as_long_as_can_be_and_every_sequence_gains_a_token(
    llama: BoundModel, sequences: int, tokens: int, session_len: int, lengths: list[int]
):
    step = LargestStep(sequences, tokens, session_len)
    assert step.lengths() == lengths
    cache = KVCache(plan_layers(llama.shapes, KVFormat.parse("int8-token")), 1, Layout(16))
    sampled = step.run(llama, cache)
    assert len(sampled) == sequences
    assert all(s.logprob is not None for s in sampled)


class Recorder:
    """Stands in for a kernel: keeps what a launch would be compiled for, and computes nothing."""

    def __init__(self, kernel: Any, seen: set[Any]):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            kinds = []
            for parameter, value in zip(self.kernel.params, args, strict=False):
                kind: Any = type(value)
                if isinstance(value, torch.Tensor):
                    kind = value.dtype, parameter.do_not_specialize_on_alignment or value.data_ptr() % 16 == 0
                elif isinstance(value, int) and not parameter.do_not_specialize:
                    kind = value == 1, value % 16 == 0
                kinds.append(kind)
            self.seen.add((self.kernel.fn.__name__, *kinds, *sorted(constants.items())))

        return launch


@pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)
@pytest.mark.parametrize("format", ["bf16", "int8-token", "int4-token", "kv8"])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_no_kernel_is_compiled_after_the_warm_up(format: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch):
    from octavo.attention.cuda import launch

    seen: set[Any] = set()
    for name in ("write", "scan", "combine"):
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), seen))
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)  # noqa: ARG005
    sequences, tokens, length = 64, 1024, 4096
    shape = LayerShape(kv_heads, 64, 64, dtype=torch.bfloat16)
    cache = KVCache(plan_layers([shape], KVFormat.parse(format)), 1, Layout(64, "pages"), raw_pages=2)
    spec = AttentionSpec(shape, 4 * kv_heads, 0.125)

    def step(lengths: list[int]) -> None:
        work = [(Sequence([0] * n), n) for n in lengths]
        for sequence, n in work:
            sequence.tables, sequence.first_page, sequence.ring = [[0] * -(-n // 64)], 0, 1
        rows = sum(lengths)
        q, k, v = (
            torch.zeros(n, rows, 64, dtype=torch.bfloat16).transpose(0, 1) for n in (4 * kv_heads, kv_heads, kv_heads)
        )
        launch.attend(spec, cache.layers[0], q, k, v, Batch.build(work, 64, span=cache.span))

    for lengths in LargestStep(sequences, tokens, length).kinds():
        step(lengths)
    warm, draw = set(seen), random.Random(0)
    assert len(warm) > 3
    for _ in range(200):
        lengths, room = [], tokens
        for _ in range(draw.choice([1, 2, 8, sequences])):
            lengths.append(min(room, draw.choice([1, 1, 2, 3, 40, 700])))
            room -= lengths[-1]
            if not room:
                break
        step([n for n in lengths if n])
    assert seen - warm == set()
