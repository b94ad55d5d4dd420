"""The last layer computes what is due: the same logits, and every row's keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from octavo.attention import cpu as attention
from octavo.engine.params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.models.bind import BoundModel
from octavo.models.due import LastLayer
from octavo.models.model import Model
from octavo.weights import cpu
from tests.engine.driving import drain, engine
from tests.models import zoo

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=3)
pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval()


def forward(bound: BoundModel, due: list[int]) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """Logits of the rows that are due, and each layer's keys and values."""
    written: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        written[layer] = k, v
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    ids = torch.tensor(bound.random_tokens(20))
    return bound.forward(ids, torch.arange(20), torch.tensor(due, dtype=torch.int64), attend), written


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "qwen3_moe", "phi", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("due", [[19], [3, 11], []], ids=str)
def test_logits_of_due_rows_are_those_of_a_forward_that_computes_all(kind: str, due: list[int]) -> None:
    """And every row's keys and values are there in every layer."""
    bound = Model.of(zoo.build(kind), Path(kind)).bound
    assert bound.shortened
    every, expected = forward(bound, list(range(20)))
    found, written = forward(bound, due)
    torch.testing.assert_close(found, every[due])
    assert written.keys() == expected.keys()
    for layer, sides in expected.items():
        assert all(map(torch.equal, written[layer], sides))


def test_only_due_rows_reach_the_last_mlp() -> None:
    hf = tiny()
    bound = Model.of(hf, Path("tiny")).bound
    rows: list[list[int]] = [[], []]
    for layer, seen in zip(hf.model.layers, rows, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
    for due in ([19], [3, 11], []):
        forward(bound, due)
    assert rows == [[20, 20, 20], [1, 2, 1]]


def mixing(hf: PreTrainedModel) -> None:
    """Rows meet once more behind attention."""
    mlp = hf.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) + x.cumsum(1)


def attending_twice(hf: PreTrainedModel) -> None:
    layer = hf.model.layers[1]
    layer.input_layernorm = nn.Sequential(layer.input_layernorm)
    layer.mlp.inner = hf.model.layers[0].self_attn


@pytest.mark.parametrize("change", [mixing, attending_twice])
def test_a_last_layer_whose_rows_are_not_alone_behind_attention_is_left_as_it_was(change: object) -> None:
    hf = tiny()
    change(hf)  # type: ignore[operator]
    bound = Model.of(hf, Path("tiny")).bound
    assert not bound.shortened
    assert not isinstance(hf.model.layers[1], LastLayer)


def test_answers_in_chunks_are_those_of_a_whole_model() -> None:
    """Prompts of several steps, of which no row, one or several are due."""
    answers = []
    for shortened in (True, False):
        bound = Model.of(tiny(), Path("tiny")).bound
        bound.shortened = shortened
        made = engine(bound, "kv8", None, layout=attention.BACKEND.layout, blocks=20, batch=3, budget=32)
        found = [Sequence(list(range(3, 3 + length)), PARAMS) for length in (1, 40, 70)]
        for sequence in found:
            made.add(sequence)
        drain(made)
        answers.append([sequence.sampled for sequence in found])
    assert answers[0] == answers[1]
