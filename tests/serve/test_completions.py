"""`/v1/completions`: prompts of every kind, the old form of log-probabilities, echoes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, InternalServerError, OpenAI

from octavo import SamplingParams
from tests.conftest import overflowing
from tests.serve.conftest import Running

STORY = "Once upon a time, there was a"
GREEDY: Any = {"model": "pamphlet", "temperature": 0}


def test_prompts_may_be_a_text_several_or_token_ids(running: Running, client: OpenAI):
    ids = running.llm.tokenizer(STORY)["input_ids"]
    other = "The cat"
    own = [c.text for c in running.llm.generate([STORY, other], SamplingParams(max_tokens=9))]
    kinds: list[Any] = [STORY, [STORY], ids, [ids], [STORY, other], [ids, running.llm.tokenizer(other)["input_ids"]]]
    for prompt in kinds:
        answer = client.completions.create(prompt=prompt, max_tokens=9, **GREEDY)
        assert answer.object == "text_completion"
        assert [choice.text for choice in answer.choices] == own[: len(answer.choices)]
    assert len(answer.choices) == 2
    assert answer.usage.completion_tokens == 18


def test_without_max_tokens_it_is_sixteen_as_openai_says(client: OpenAI):
    answer = client.completions.create(prompt=STORY, extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.usage.completion_tokens == 16


def test_several_answers_to_several_prompts_are_counted_once_per_prompt(running: Running, client: OpenAI):
    answer = client.completions.create(prompt=[STORY, "The cat"], n=2, max_tokens=4, **GREEDY)
    tokens = [len(running.llm.tokenizer(prompt)["input_ids"]) for prompt in (STORY, "The cat")]
    assert answer.usage.prompt_tokens == sum(tokens)
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_begins_with_the_prompt(client: OpenAI, stream: bool):
    plain = client.completions.create(prompt=STORY, max_tokens=5, **GREEDY).choices[0].text
    answer = client.completions.create(prompt=STORY, max_tokens=5, echo=True, stream=stream, **GREEDY)
    text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert text == STORY + plain


def test_log_probabilities_in_the_old_form(client: OpenAI):
    choice = client.completions.create(prompt=STORY, max_tokens=5, logprobs=2, **GREEDY).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(5)]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 2
        assert max(top, key=top.get) == token
        assert top[token] == logprob


def test_fields_beyond_openais_have_the_names_of_sampling_params(client: OpenAI):
    asked: Any = {"prompt": STORY, "max_tokens": 10, "model": "pamphlet", "seed": 5, "temperature": 2}
    best = client.completions.create(**asked | {"temperature": 0}).choices[0].text
    assert client.completions.create(**asked, extra_body={"top_k": 1}).choices[0].text == best
    assert client.completions.create(**asked, extra_body={"min_p": 1.0}).choices[0].text == best
    assert client.completions.create(**asked).choices[0].text != best


def test_sampling_is_that_of_the_models_generation_config_unless_asked(running: Running, client: OpenAI):
    own = running.llm.default_params
    assert own.temperature == 0.7
    plain = client.completions.create(prompt=STORY, model="pamphlet", seed=11)
    named = client.completions.create(
        prompt=STORY, model="pamphlet", seed=11, temperature=own.temperature, top_p=own.top_p
    )
    assert plain.choices[0].text == named.choices[0].text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "empty"),
        ({"prompt": [4096]}, "token 4096"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 101}, "logprobs"),
        ({"stop_token_ids": [9999]}, "token 9999"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client: OpenAI, fields: dict[str, Any], named: str):
    with pytest.raises(BadRequestError) as refusal:
        client.post("/completions", body={"prompt": STORY, **fields}, cast_to=object)
    error = refusal.value.body
    assert error["param"] == named or named in error["message"]


def test_nothing_is_made_for_answers_that_are_too_many(client: OpenAI, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("octavo.serve.routes.completions.TextBody", None)
    with pytest.raises(BadRequestError, match="300 answers are more than this server takes") as refusal:
        client.completions.create(model="pamphlet", prompt=["a"] * 100, n=3)
    assert refusal.value.param == "n"


def test_one_prompt_that_cannot_fit_refuses_the_request_as_itself(client: OpenAI):
    for _ in range(5):
        with pytest.raises(BadRequestError, match="the prompt has") as refusal:
            client.completions.create(model="pamphlet", prompt=[STORY, "word " * 600])
        assert refusal.value.code == "context_length_exceeded"


def test_ends_and_special_tokens_have_vllms_fields(running: Running, client: OpenAI):
    asked: Any = {"prompt": "<|user|>Tell me a story about a dog.<|end|><|assistant|>", "max_tokens": 450, **GREEDY}

    def text(**more: Any) -> str:
        choice = client.completions.create(**asked, extra_body=more).choices[0]
        assert choice.finish_reason == "stop"
        return choice.text

    plain = text()
    assert text(stop=["<|end|>"], ignore_eos=True) == plain
    assert text(skip_special_tokens=False, include_stop_str_in_output=True) == f"{plain}<|end|>"
    [token] = running.llm.tokenizer(plain)["input_ids"][3:4]
    assert plain.startswith(text(stop_token_ids=[token]))
    assert len(text(stop=[" "], min_tokens=10)) > len(text(stop=[" "]))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_overflows_is_one_error_and_its_neighbour_goes_on(
    running: Running, client: OpenAI, stream: bool
):
    asked: Any = {"model": "pamphlet", "temperature": 0, "max_tokens": 8}
    alone = client.completions.create(prompt=STORY, **asked).choices[0].text
    with overflowing(running.llm.model, 1234), ThreadPoolExecutor() as pool:
        beside = pool.submit(client.completions.create, prompt=STORY, **asked)
        with pytest.raises(InternalServerError, match=r"overflow.*--dtype"):
            list(client.completions.create(prompt=[5, 1234], stream=stream, logprobs=1, **asked))
        assert beside.result().choices[0].text == alone
