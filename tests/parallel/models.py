"""Tiny random models on disk, which two ranks can load, and the engines that are compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel
from octavo.models.model import BUNDLED, Model
from octavo.parallel import load
from octavo.quant.calibration import Calibration
from tests.engine.driving import engine, run

FORMATS = ("fp32", "int8", "int8-token", "kv8", "k8v4", "kv4")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CLOSE = 1e-4  # log-probabilities, where K and V are kept as they are
FLIPPED = (
    0.02  # where they are coded: a sum over ranks rounds otherwise, and a value between two codes goes to the other
)


def tiny(directory: Path, kv_heads: int, **more: Any) -> Path:
    """A random Llama of four query heads, with the tokenizer of the bundled model."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=1024, initializer_range=0.2, dtype="float32", **more
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    for name in TOKENIZER:
        shutil.copy(BUNDLED / name, directory)
    return directory


def alone(path: Path | None) -> Model:
    return Model.load(path, device="cpu", dtype="float32")


@contextmanager
def divided(path: Path | None, ranks: int = 2) -> Iterator[Model]:
    """The model divided among ranks, which end with the block."""
    model = load(path, ranks, device="cpu", dtype="float32")
    try:
        yield model
    finally:
        model.bound.close()  # type: ignore[attr-defined]


def prompts(bound: BoundModel, block: int) -> list[list[int]]:
    """Of six blocks each or nine, nearly full: two that begin alike, by two blocks and more, and one that does not."""
    length = 6 * block - 6
    one, other, third = (bound.random_tokens(length, seed=seed) for seed in range(3))
    return [one, one[: length // 2] + other, third]


def answers(
    bound: BoundModel, kv: str, calibration: Calibration, asked: list[list[int]], **limits: Any
) -> list[Sequence]:
    """Greedy answers, and one that is drawn, each with log-probabilities."""
    made = engine(bound, kv, calibration, batch=4, **limits)
    found = run(made, asked, 12, logprobs=3)
    return found + run(made, asked[:1], 12, logprobs=3, temperature=0.8, seed=5)


def assert_equal(found: list[Sequence], expected: list[Sequence], within: float = CLOSE) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.output == other.output
        for a, b in zip(one.sampled, other.sampled, strict=True):
            assert a.logprob is not None
            assert b.logprob is not None
            assert abs(a.logprob - b.logprob) < within
