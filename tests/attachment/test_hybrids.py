"""`octavo.attach` of models whose layers keep states: transformers' own layers hold these, beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import octavo
from octavo.errors import OctavoError
from tests.attachment.test_attach import generated, random_prompts
from tests.engine.test_transformers import with_own_head
from tests.models import zoo

MODELS = ("qwen3_5_text", "granitemoehybrid", "lfm2", "falcon_h1")


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=MODELS)
def hf(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = with_own_head(zoo.build(request.param))
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("how", [{}, pytest.param({"num_beams": 3}, marks=pytest.mark.slow)], ids=["greedy", "beams"])
def test_a_padded_batch_gets_the_answers_of_transformers(hf: PreTrainedModel, how: dict[str, Any]):
    """In a cache that rounds nothing the tokens are those of transformers' own cache, with beams that are put in
    another order too; afterwards the model is as it was."""
    prompts, classes = random_prompts(3, 30, 11, 1), [type(module) for module in hf.modules()]
    expected = generated(hf, prompts, 10, past_key_values=DynamicCache(config=hf.config), **how)
    with octavo.attach(hf, "fp32") as cache:
        assert generated(hf, prompts, 10, past_key_values=cache, **how) == expected
        cache.reset()
        assert generated(hf, prompts[1:2], 10, past_key_values=cache, **how) == expected[1:2]
    assert [type(module) for module in hf.modules()] == classes


def test_a_copy_goes_on_by_itself(hf: PreTrainedModel):
    """With codes: a prompt is read once, and two answers go on from it."""
    prompt, *ends = random_prompts(70, 5, 9)
    with octavo.attach(hf, "int8-token") as cache:
        wholes = []
        for end in ends:
            wholes.append(generated(hf, [prompt + end], 8, past_key_values=cache))
            cache.reset()
        hf(torch.tensor([prompt]), past_key_values=cache)
        assert cache.nbytes > cache.sequences.cache.nbytes
        for end, whole in zip(ends, wholes, strict=True):
            assert generated(hf, [prompt + end], 8, past_key_values=deepcopy(cache)) == whole


def test_states_are_not_cut_back_and_not_used_after_a_forward_that_failed(hf: PreTrainedModel):
    """One line says so; after a reset the cache is as new. Convolutions alone can be cut back."""
    [prompt] = random_prompts(20)
    with octavo.attach(hf, "int8-token") as cache:
        expected = generated(hf, [prompt], 8, past_key_values=cache)
        if hf.config.model_type != "lfm2":
            with pytest.raises(OctavoError, match="cannot be cut back"):
                cache.crop(-1)
        cache.reset()
        handle = hf.get_output_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hf(torch.tensor([prompt]), past_key_values=cache)
        handle.remove()
        with pytest.raises(OctavoError, match=r"reset\(\) it"):
            hf(torch.tensor([prompt]), past_key_values=cache)
        cache.reset()
        assert generated(hf, [prompt], 8, past_key_values=cache) == expected
