"""Chat templates as the models' publishers wrote them: our own texts write calls as they do, and calls by them work."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from octavo.models.model import Model
from octavo.serve.calls import FreeReader, syntax_of
from tests.serve.calls.published import TEMPLATES
from tests.serve.calls.test_families import EVERYTHING, ROME, called, check_template, read

PUBLISHED = [model for model in TEMPLATES if TEMPLATES[model].original]


def published(model: str) -> str:
    text = TEMPLATES[model].published
    if text is None:
        pytest.skip("the published templates are not here: make test-clients")
    return text


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_own_text_writes_calls_as_the_published_one(pamphlet: Model, model: str):
    own, text = TEMPLATES[model].text, published(model)
    for arguments in ([ROME], [EVERYTHING]):
        assert called(pamphlet.tokenizer, own, arguments) == called(pamphlet.tokenizer, text, arguments)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_own_text_writes_results_as_the_published_one(pamphlet: Model, model: str):
    """History with a call and its result: from the call on both write the same."""
    call: dict[str, Any] = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": ROME}}
    told = [
        {"role": "user", "content": "How is it in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "name": "weather", "content": "Sunny"},
    ]

    def rendered(template: str) -> str:
        whole = pamphlet.tokenizer.apply_chat_template(
            told, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return whole[whole.rindex("Rome") :]

    assert rendered(TEMPLATES[model].text) == rendered(published(model))


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "letters"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_a_call_by_the_published_template_is_read_and_held_to(pamphlet: Model, model: str, tokens: bool):
    check_template(copy.deepcopy(pamphlet.tokenizer), TEMPLATES[model].family, published(model), tokens)


@pytest.mark.parametrize("model", PUBLISHED)
def test_arguments_of_every_kind_by_the_published_template_are_read(pamphlet: Model, model: str):
    written = called(pamphlet.tokenizer, published(model), [EVERYTHING])
    assert read(FreeReader(syntax_of(published(model)), ["weather"]), written, 3) == ("", [("weather", EVERYTHING)])
