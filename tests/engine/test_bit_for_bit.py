"""The same bits in any company: what a CPU without bf16 units computes, and every other one with --deterministic."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.attention import cpu
from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.errors import OctavoError
from octavo.models.bind import BoundModel, bind
from octavo.models.packed import noise
from octavo.models.prepack import prepack
from octavo.quant.calibration import SYNTHETIC, Calibration
from octavo.weights.checkpoint import read_format
from tests.conftest import observe, slow
from tests.engine.driving import drain, engine
from tests.models import zoo
from tests.models.recurrent import SIZED

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")

FORMATS = ("fp32", "int8", "kv8", "kv4", *slow("k8v4", "bf16", "int8-token"))
REQUESTS, VOCABULARY = 20, 307
KINDS = [  # greedy and seeded, in turn
    {}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.8, "top_k": 9}, {"repetition_penalty": 1.2},
    {"temperature": 1.5, "min_p": 0.02},
]  # fmt: skip
WAYS = {  # and the number of threads
    "together": (1, {"batch": REQUESTS}),
    "on three threads": (3, {"batch": REQUESTS, "hits": False}),
    "in chunks of 16": (1, {"batch": 7, "budget": 16}),
    "in chunks of 100": (1, {"batch": 3, "budget": 100}),
    "preempted": (1, {"batch": 12, "blocks": 8}),
}


def tiny(computing: torch.dtype, weights: str = "bf16") -> BoundModel:
    """Of sizes that no register's width divides, as few models have them."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=80, intermediate_size=208 if weights == "int4" else 215, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if weights == "int4":
            method = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
            hf = noise(LlamaForCausalLM, config, torch.bfloat16, read_format(method, "the test"))
        else:
            hf = LlamaForCausalLM(config).bfloat16()
    bound = bind(hf)
    prepack(bound, computing, deterministic=True)
    assert bound.computes == computing
    return bound


@pytest.fixture(scope="module")
def model() -> BoundModel:
    return tiny(torch.float32)


@pytest.fixture(scope="module")
def calibration(model: BoundModel) -> Calibration:
    return observe(model, random.Random(1).choices(range(VOCABULARY), k=200), SYNTHETIC)


@pytest.fixture(scope="module", params=FORMATS)
def kv(request: pytest.FixtureRequest) -> str:
    return request.param


def requests() -> list[Sequence]:
    """Prompts of 1 to 200 tokens; a third of them share their first 130."""
    chosen = random.Random(2)
    shared = chosen.choices(range(VOCABULARY), k=130)
    found = []
    for i in range(REQUESTS):
        own = chosen.choices(range(VOCABULARY), k=chosen.choice([1, 5, 20, 55, 58, 60, 62, 64]))
        prompt = shared + own if i % 3 == 0 else own + own[: i % 2 * 62]
        params = SamplingParams(max_tokens=3 + 7 * i % 17, logprobs=5, seed=i, **KINDS[i % len(KINDS)])
        found.append(Sequence(prompt, params))
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def answers(
    model: BoundModel, kv: str, calibration: Calibration | None, alone: bool = False, count: int = REQUESTS, **how: int
) -> list[Sequence]:
    made = engine(model, kv, calibration, layout=cpu.BACKEND.layout, **{"blocks": 200, "snapshots": 20} | how)
    found = requests()[:count]
    for sequence in found:
        made.add(sequence)
        if alone:
            drain(made)
    drain(made)
    return found


@pytest.fixture(scope="module")
def alone(model: BoundModel, kv: str, calibration: Calibration) -> list[Sequence]:
    """Each on its own in a cold cache, on one thread."""
    with threads(1):
        return answers(model, kv, calibration, alone=True, hits=False)


def expect_equal(found: list[Sequence], alone: list[Sequence]) -> None:
    """Tokens, log-probabilities, and the five best tokens' in every place."""
    for i, (one, other) in enumerate(zip(found, alone, strict=True)):
        assert one.sampled == other.sampled, i


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_does_not_depend_on_its_company(
    model: BoundModel, kv: str, calibration: Calibration, alone: list[Sequence], way: str
) -> None:
    count, how = WAYS[way]
    with threads(count):
        found = answers(model, kv, calibration, **how)
    if way == "preempted":
        assert any(s.preemptions for s in found)
    if way == "together":
        assert any(s.prefix_hit for s in found)
    expect_equal(found, alone)


@pytest.mark.parametrize(
    ("computing", "weights"), [(torch.bfloat16, "bf16"), (torch.float32, "int4"), (torch.bfloat16, "int4")], ids=str
)
def test_nor_where_activations_are_bf16_or_weights_of_4_bits(computing: torch.dtype, weights: str) -> None:
    model = tiny(computing, weights)
    with threads(1):
        alone = answers(model, "kv8", None, alone=True, hits=False)
        for how in ({"batch": REQUESTS}, {"batch": 7, "budget": 16}):
            expect_equal(answers(model, "kv8", None, **how), alone)


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", *slow("granitemoehybrid", "falcon_h1")])
def test_nor_of_a_hybrid(name: str) -> None:
    """Its recurrences go on from states: alone, together, after prefix hits, in chunks and preempted."""
    hf = zoo.build(name, hidden_size=64, vocab_size=VOCABULARY, max_position_embeddings=512, **SIZED[name])
    model = bind(hf)
    prepack(model, torch.float32, deterministic=True)
    with threads(1):
        alone = answers(model, "kv8", None, alone=True, count=7, hits=False)
        for way in ("together", "in chunks of 16", "preempted"):
            expect_equal(answers(model, "kv8", None, count=7, **WAYS[way][1]), alone)


def test_a_hybrid_whose_bits_depend_on_their_place_is_refused() -> None:
    """Its rows of four gates are no whole register."""
    model = bind(zoo.build("qwen3_5_text"))
    with pytest.raises(OctavoError, match="leave --deterministic out"):
        prepack(model, torch.float32, deterministic=True)
