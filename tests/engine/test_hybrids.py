"""Models whose layers are partly recurrent, through the whole engine: in every way to an answer the tokens are those of
transformers' own forward with its cache, and no slot of states is left behind."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel, bind
from tests.engine.driving import drain, engine, run
from tests.models import zoo

MODELS = ("qwen3_5_text", "granitemoehybrid", "lfm2", "falcon_h1")
LENGTHS = (31, 5, 18, 40, 12, 1, 23, 9)  # tokens of the prompts
ANSWER = 12
NEAR = 1e-4  # of log-probabilities


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> BoundModel:
    return bind(zoo.build(request.param))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def wanted(model: BoundModel) -> list[tuple[list[int], list[float]]]:
    """Greedy answers of transformers, token by token with its own cache, and their log-probabilities."""
    hf = zoo.build(model.hf.config.model_type)
    hf.set_attn_implementation("eager")
    return [own_answer(hf, prompt) for prompt in prompts()]


@torch.inference_mode()
def own_answer(hf: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    cache, ids, tokens, logprobs = DynamicCache(config=hf.config), prompt, [], []
    for _ in range(ANSWER):
        logits = hf(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
        tokens.append(int(logits.argmax()))
        logprobs.append(logits.log_softmax(-1).max().item())
        ids = tokens[-1:]
    return tokens, logprobs


WAYS = {
    "together": {},
    "chunked": {"budget": 8, "batch": 4},
    "preempted": {"blocks": 40, "block_size": 4},
    "launched ahead": {"overlap": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_transformers_with_its_own_cache(
    model: BoundModel, wanted: list[tuple[list[int], list[float]]], way: str
):
    """Tokens are equal and log-probabilities within 1e-4, whatever is computed beside, and in whatever chunks."""
    made = engine(model, "fp32", **WAYS[way])
    found = run(made, prompts(), ANSWER, logprobs=1)
    assert any(sequence.preemptions for sequence in found) == (way == "preempted")
    for sequence, (tokens, logprobs) in zip(found, wanted, strict=True):
        assert sequence.output == tokens
        assert [one.logprob for one in sequence.sampled] == pytest.approx(logprobs, abs=NEAR)


def test_a_slot_of_states_belongs_to_a_sequence_while_it_runs(model: BoundModel):
    """It is taken when the sequence starts, and free when it ends, by its length, an abort or a preemption."""
    made = engine(model, "fp32", batch=3)
    states = made.cache.states
    sequences = [Sequence(prompt, SamplingParams(max_tokens=6)) for prompt in prompts()[:4]]
    for sequence in sequences:
        made.add(sequence)
    made.step()
    assert states.used == 3
    assert sequences[3].state_slot is None
    made.finish(sequences[0])
    assert states.used == 2
    drain(made)
    assert states.used == 0


def test_a_step_that_fails_leaves_answers_as_they_were(
    model: BoundModel, wanted: list[tuple[list[int], list[float]]], monkeypatch: pytest.MonkeyPatch
):
    """States have gone on in a forward that does not end: what runs is computed again."""
    made = engine(model, "fp32")
    sequence = Sequence(prompts()[0], SamplingParams(max_tokens=ANSWER))
    made.add(sequence)
    for _ in range(3):
        made.step()
    forward = made.runner.run

    def interrupted(batch: object) -> None:
        forward(batch)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(made.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.step()
    monkeypatch.undo()
    drain(made)
    assert sequence.output == wanted[0][0]
