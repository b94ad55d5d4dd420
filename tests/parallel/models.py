"""Tiny random models on disk, which two ranks can load, and the engines that are compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.attention.cpu import BACKEND
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel
from octavo.models.model import BUNDLED, Model
from octavo.parallel import load
from octavo.quant.calibration import Calibration
from tests.engine.driving import engine, run
from tests.models.forms import mixture

FORMATS = ("kv8", "fp32", "int8", "int8-token", "k8v4", "kv4")
TILES = BACKEND.layout
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def tiny(directory: Path, kv_heads: int, **more: Any) -> Path:
    """A random Llama of four query heads, with the tokenizer of the bundled model."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=1024, initializer_range=0.2, dtype="float32", **more
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return _with_tokenizer(directory)


def packed_mixture(directory: Path) -> Path:
    """A random Mixtral of four experts, all of its layers in 4 bits."""
    mixture("mixtral", "awq", directory, vocab_size=4096, max_position_embeddings=1024)
    return _with_tokenizer(directory)


def _with_tokenizer(directory: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(BUNDLED / name, directory)
    return directory


# On every processor the products and attention whose sums do not depend on what is computed together.
LOADING: dict[str, Any] = {"device": "cpu", "dtype": "float32", "deterministic": True}


def alone(path: Path | None, **loading: Any) -> Model:
    return Model.load(path, **LOADING | loading)


@contextmanager
def divided(path: Path | None, ranks: int = 2, **loading: Any) -> Iterator[Model]:
    """The model divided among ranks, which end with the block."""
    model = load(path, ranks, **LOADING | loading)
    try:
        yield model
    finally:
        model.bound.close()  # type: ignore[attr-defined]


def prompts(text: list[int]) -> list[list[int]]:
    """Of six blocks each or nine, nearly full: two that begin alike, by two blocks and more, and one that does not."""
    length = 6 * TILES.block_size - 6
    return [text[:length], text[: length // 2] + text[length : 2 * length], text[2 * length : 3 * length]]


def answers(
    bound: BoundModel, kv: str, calibration: Calibration, asked: list[list[int]], **limits: Any
) -> list[Sequence]:
    """Greedy answers, and one that is drawn, each with log-probabilities."""
    made = engine(bound, kv, calibration, batch=4, layout=TILES, **limits)
    found = run(made, asked, 12, logprobs=3)
    return found + run(made, asked[:1], 12, logprobs=3, temperature=0.8, seed=5)


def assert_same_answers(one: Model, two: Model, calibration: Calibration, kv: str, text: list[int]) -> None:
    """The divided model answers in small steps and in a cache too small for all, the other without either: tokens are
    equal, and log-probabilities to the last bit."""
    asked = prompts(text)
    expected = answers(one.bound, kv, calibration, asked)
    found = answers(two.bound, kv, calibration, asked, budget=5 * TILES.block_size // 2, blocks=13)
    assert any(sequence.preemptions for sequence in found), kv
    assert any(sequence.prefix_hit for sequence in found), kv
    for own, other in zip(found, expected, strict=True):
        assert own.output == other.output, kv
        assert own.sampled == other.sampled, kv
