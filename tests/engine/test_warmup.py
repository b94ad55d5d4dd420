"""The largest step there can be: it runs, and it is the largest. Its bytes are measured on a GPU alone."""

from __future__ import annotations

import pytest

from octavo.cache.layout import Layout
from octavo.cache.plan import plan_layers
from octavo.cache.store import KVCache
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
