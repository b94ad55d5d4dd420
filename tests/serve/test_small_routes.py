"""The routes beside chat and completions: tokens, models, versions, vLLM's metrics."""

from __future__ import annotations

import re
from typing import Any

import httpx2 as httpx
import pytest

from octavo import __version__
from tests.serve.conftest import Running

MESSAGES = [{"role": "user", "content": "Größe 🦊 of a fox"}]


def post(running: Running, route: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{running.url}{route}", json=body, timeout=60)


def test_tokens_are_those_that_a_prompt_is_computed_of_and_give_its_text_back(running: Running):
    text = MESSAGES[0]["content"]
    told = post(running, "/tokenize", prompt=text, return_token_strs=True).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 512
    assert post(running, "/detokenize", tokens=told["tokens"]).json() == {"prompt": text}
    answer = post(running, "/v1/completions", prompt=text, max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] == told["count"]
    assert post(running, "/tokenize", prompt="").json()["tokens"] == []


def test_a_conversation_has_the_tokens_of_its_answer_s_prompt(running: Running):
    told = post(running, "/tokenize", messages=MESSAGES).json()
    answer = post(running, "/v1/chat/completions", messages=MESSAGES, max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] == told["count"]
    bare = post(running, "/tokenize", messages=MESSAGES, add_generation_prompt=False).json()
    assert told["tokens"][: bare["count"]] == bare["tokens"]
    assert bare["count"] < told["count"]


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "text": "b"}, "text"),
        ("/detokenize", {"tokens": [1, 1 << 20]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(running: Running, route: str, body: Any, field: str):
    refused = post(running, route, **body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == field


def test_health_version_and_one_model(running: Running):
    assert httpx.get(f"{running.url}/health").json()["status"] == "ok"
    assert httpx.get(f"{running.url}/ping").status_code == httpx.post(f"{running.url}/ping").status_code == 200
    assert httpx.get(f"{running.url}/version").json() == {"version": __version__}
    name = running.server.service.name
    assert httpx.get(f"{running.url}/v1/models/{name}").json()["max_model_len"] == 512
    assert httpx.get(f"{running.url}/v1/models/other").status_code == 404


def test_metrics_that_vllm_has_too_bear_its_names_and_count_requests(running: Running):
    def value(name: str) -> float:
        text = httpx.get(f"{running.url}/metrics").text
        found = re.search(rf'^vllm:{name}{{engine="0",[^}}]*model_name="pamphlet"[^}}]*}} (\S+)$', text, re.MULTILINE)
        assert found, name
        return float(found[1])

    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [value(name) for name in gauges] == [0, 0, 0]
    post(running, "/v1/completions", prompt=[5] * 130, max_tokens=1)  # whole blocks of it are cached from here on
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "e2e_request_latency_seconds_count",
    )
    names = (*names, "request_prompt_tokens_sum", "prefix_cache_queries_total", "prefix_cache_hits_total")
    before = [value(name) for name in names]
    post(running, "/v1/completions", prompt=[5] * 130, max_tokens=7, ignore_eos=True)
    grown = [value(name) - old for name, old in zip(names, before, strict=True)]
    assert grown == [130, 7, 1, 1, 130, 130, 128]
