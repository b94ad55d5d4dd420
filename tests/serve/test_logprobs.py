"""Log-probabilities over HTTP: tokens make up the text, and their names differ, also where several are a character."""

from __future__ import annotations

import math
from typing import Any

import httpx2 as httpx
import pytest

from octavo.engine.reading import Reading
from octavo.engine.sequence import Sampled
from octavo.serve.output.logprobs import ShownToken, TokenTexts, text_logprobs
from octavo.token_bytes import TokenBytes
from tests.serve.conftest import Running, saying
from tests.test_text import FALLBACK

STORY = "Once upon a time, there was a"
EMOJI = "Look: 🐕 and 中!"


def post(running: Running, route: str = "completions", **fields: Any) -> dict[str, Any]:
    base = {"prompt": STORY} if route == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    answer = httpx.post(f"{running.url}/v1/{route}", json={"temperature": 0, **base, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def whole(name: str) -> bytes:
    """The bytes that a token's name stands for."""
    if not name.startswith("bytes:"):
        return name.encode()
    return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))


def test_parts_of_a_character_have_names_of_their_own_and_offsets_count_the_text(running: Running):
    with saying(running.llm, EMOJI):
        choice = post(running, max_tokens=60, logprobs=20)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == EMOJI
    assert b"".join(map(whole, found["tokens"])).decode() == EMOJI
    assert any(name.startswith("bytes:\\x") for name in found["tokens"])
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) >= 20, "no two tokens share a name"
        assert top[token] == logprob == max(top.values())
    read = b""
    for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert offset == len(read.decode(errors="ignore"))
        read += whole(name)


def test_chat_tells_the_bytes_of_each_token(running: Running):
    with saying(running.llm, EMOJI):
        choice = post(running, "chat/completions", max_tokens=60, logprobs=True, top_logprobs=2)["choices"][0]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == choice["message"]["content"] == EMOJI
    assert any(one["token"].startswith("\\x") for one in content)
    assert all(len({tuple(other["bytes"]) for other in one["top_logprobs"]}) == 2 for one in content)


def test_the_chosen_token_is_told_though_it_is_not_among_the_likeliest(running: Running):
    [token] = running.llm.tokenizer(" dog")["input_ids"]
    choice = post(running, max_tokens=2, logprobs=1, logit_bias={str(token): 100})["choices"][0]
    assert choice["text"] == " dog dog"
    assert all(" dog" in top and len(top) == 2 for top in choice["logprobs"]["top_logprobs"])


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_stop_string_cut_off_has_no_tokens(running: Running, stream: bool):
    text = post(running, max_tokens=20)["choices"][0]["text"]
    fields: dict[str, Any] = {"max_tokens": 20, "logprobs": 0, "stop": text[12:17]}
    if not stream:
        choices = [post(running, **fields)["choices"][0]]
    else:
        import json

        body = {"prompt": STORY, "temperature": 0, "stream": True, **fields}
        lines = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).text.split("\n\n")
        choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    shown = "".join(choice["text"] for choice in choices)
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert shown == text[: text.index(text[12:17])]
    assert "".join(tokens).startswith(shown)
    assert offsets[-1] < len(shown)
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]


def test_pieces_of_sentencepiece_keep_the_space_that_they_begin_with():
    bytes_of = TokenBytes(FALLBACK)
    ids = FALLBACK.convert_tokens_to_ids(["▁a", "▁", "a", "<0xE4>", "<0xB8>", "<0xAD>"])
    assert [bytes_of(token) for token in ids] == [b" a", b" ", b"a", b"\xe4", b"\xb8", b"\xad"]
    texts = TokenTexts(bytes_of, bytes_of.special)
    shown = texts.take([Sampled(token, -1.0, {token: -1.0}) for token in ids], " a a中", None)
    told = text_logprobs(bytes_of, shown)
    assert told["tokens"] == [" a", " ", "a", "bytes:\\xe4", "bytes:\\xb8", "bytes:\\xad"]
    assert told["text_offset"] == [0, 2, 3, 4, 4, 4]


def test_two_tokens_of_one_text_have_two_names():
    class Twins(TokenBytes):
        def __init__(self) -> None:
            self.special = frozenset()

        def __call__(self, token: int) -> bytes:
            return b"A" if token < 3 else b"B"

    shown = [ShownToken(Sampled(2, -2.0, {0: -1.0, 1: -1.5, 3: -3.0}), 0)]
    [top] = text_logprobs(Twins(), shown)["top_logprobs"]
    assert top == {"A": -1.0, "bytes:\\x41": -1.5, "token_id:2": -2.0, "B": -3.0}


def test_a_prompts_tokens_have_the_log_probabilities_of_one_forward(running: Running):
    ids = running.llm.tokenizer(STORY)["input_ids"]
    logprobs = next(Reading(running.llm.model.bound).logits(ids)).log_softmax(-1)
    answer = post(running, max_tokens=1, prompt_logprobs=2)
    first, *others = answer["prompt_logprobs"]
    assert first is None
    assert len(others) == len(ids) - 1
    for i, told in enumerate(others):
        own = told[str(ids[i + 1])]
        assert own["logprob"] == pytest.approx(logprobs[i, ids[i + 1]].item(), abs=1e-4)
        assert own["rank"] == (logprobs[i] > logprobs[i, ids[i + 1]]).sum() + 1
        assert {1, 2} <= {one["rank"] for one in told.values()}


def test_more_log_probabilities_of_a_prompt_than_are_kept_are_refused(running: Running):
    body = {"model": running.llm.model.name, "prompt": [[5] * 400] * 4, "max_tokens": 1, "prompt_logprobs": 100}
    refused = httpx.post(f"{running.url}/v1/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt_logprobs"


def test_an_echo_with_log_probabilities_scores_the_prompt_too(running: Running):
    plain = post(running, max_tokens=3, logprobs=1)["choices"][0]
    choice = post(running, max_tokens=3, logprobs=1, echo=True)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == STORY + plain["text"] == "".join(found["tokens"])
    assert found["token_logprobs"][0] is None is found["top_logprobs"][0]
    assert all(math.isfinite(logprob) for logprob in found["token_logprobs"][1:])
    assert found["token_logprobs"][-3:] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-4)
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(len(found["tokens"]))]


def test_an_echo_is_what_the_model_was_given_of_a_prompt_that_was_cut(running: Running):
    choice = post(running, max_tokens=3, logprobs=1, echo=True, truncate_prompt_tokens=4)["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == 7
    assert "".join(found["tokens"]) == choice["text"]
    assert STORY.endswith(kept := "".join(found["tokens"][:4]))
    assert kept != STORY
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(7)]


def test_special_tokens_that_stand_in_a_prompt_count_in_its_text(running: Running):
    tokenizer = running.llm.tokenizer
    [special] = tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    words = tokenizer(STORY, add_special_tokens=False)["input_ids"]
    for prompt in ([special, *words], STORY[:9] + tokenizer.eos_token + STORY[9:]):
        choice = post(running, prompt=prompt, max_tokens=3, logprobs=1, echo=True)["choices"][0]
        names = choice["logprobs"]["tokens"]
        assert "".join(names) == choice["text"]
        assert choice["logprobs"]["text_offset"] == [len("".join(names[:i])) for i in range(len(names))]
