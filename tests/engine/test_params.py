"""One table says what a request may ask for: every place that reads requests takes its parameters, by its rules."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest
from typer.testing import CliRunner

from octavo.cli import commands
from octavo.engine.params import DEFAULTS, MAX_LOGPROBS, TABLE, SamplingParams, allowed
from octavo.errors import OctavoError
from octavo.serve.errors import ApiError
from octavo.serve.requests import ChatRequest, CompletionRequest, parse
from scripts.parameters import PAGE, page

WRONG: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", "5"),
    ("max_tokens", 5.0),
    ("max_tokens", True),
    ("max_tokens", None),
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("temperature", math.inf),
    ("temperature", math.nan),
    ("temperature", "hot"),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_p", -0.1),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", math.nan),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -3),
    ("logit_bias", {1: 101}),
    ("logit_bias", {1: -101}),
    ("logit_bias", {"a": 1}),
    ("logit_bias", [1]),
    ("seed", -(1 << 63) - 1),
    ("seed", 1 << 64),
    ("stop", ""),
    ("stop", 5),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 65),
    ("stop", "a" * 1025),
    ("stop_token_ids", "5"),
    ("stop_token_ids", [1, "x"]),
    ("stop_token_ids", -1),
    ("include_stop_str_in_output", 1),
    ("ignore_eos", 1),
    ("skip_special_tokens", "no"),
    ("logprobs", True),
    ("logprobs", -1),
    ("logprobs", MAX_LOGPROBS + 1),
    ("json_schema", 1),
    ("regex", ""),
    ("choice", [1]),
    ("grammar", 5),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda one: str(one)[:20])
def test_python_refuses_what_a_rule_does_not_take_with_one_sentence_that_names_the_parameter(name: str, value: Any):
    with pytest.raises(OctavoError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name} is ")
    assert str(error.value).endswith(f"; it must be {TABLE[name].kind.expected}")
    assert len(str(error.value)) < 250
    assert error.value.field == name


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda one: str(one)[:20])
def test_http_refuses_what_a_rule_does_not_take_by_the_parameters_name(name: str, value: Any):
    if name not in allowed("HTTP") or value is None:
        pytest.skip("not a field over HTTP, or null, which is as if it were not there")
    with pytest.raises(ApiError) as error:
        parse(json.dumps({"prompt": "x", name: value}).encode(), CompletionRequest, 10_000)
    assert error.value.status == 400
    assert str(error.value.param).split(".")[0] == name or "JSON" in error.value.message


def test_what_is_taken_has_one_form_however_it_is_written():
    one = SamplingParams(stop="end", stop_token_ids=7, logit_bias={"5": 1}, top_k=-1, seed=-1, temperature=1)
    assert (one.stop, one.stop_token_ids, one.logit_bias) == (("end",), (7,), {5: 1.0})
    assert (one.top_k, one.seed) == (0, (1 << 64) - 1)
    assert one == SamplingParams(
        stop=["end"], stop_token_ids=[7], logit_bias={5: 1.0}, seed=(1 << 64) - 1, temperature=1.0
    )


def test_parameters_that_contradict_each_other_are_refused():
    with pytest.raises(OctavoError, match="min_tokens is 9; it must be at most max_tokens, 8"):
        SamplingParams(min_tokens=9, max_tokens=8)
    for other in ({"ignore_eos": True}, {"min_tokens": 1}):
        with pytest.raises(OctavoError, match=f"json_schema and {next(iter(other))} exclude each other"):
            SamplingParams(json_schema={}, **other)
    with pytest.raises(OctavoError, match="json_schema and regex exclude each other"):
        SamplingParams(json_schema={}, regex="a")


@pytest.mark.parametrize("settings", [{"temperature": 0.0, "do_sample": True}, {"top_p": 0}])
def test_a_model_with_a_temperature_or_top_p_of_zero_is_greedy(settings: dict[str, Any]):
    assert SamplingParams.of_model(settings, 1.0) == SamplingParams()


def test_a_model_that_does_not_sample_has_the_temperature_that_is_said():
    settings = {"temperature": 0.1, "top_k": 3, "repetition_penalty": 1.2, "do_sample": False}
    assert SamplingParams.of_model(settings) == SamplingParams(repetition_penalty=1.2)
    assert SamplingParams.of_model(settings, 1.0) == SamplingParams(temperature=1.0, repetition_penalty=1.2)


def test_every_parameter_has_a_rule_and_every_default_keeps_its_own():
    assert list(TABLE) == [f.name for f in fields(SamplingParams)]
    for name, rule in TABLE.items():
        assert DEFAULTS[name] is None or rule.kind.read(DEFAULTS[name]) == DEFAULTS[name]


def test_requests_over_http_have_the_tables_fields_with_its_bounds():
    for kind in (CompletionRequest, ChatRequest):
        properties = kind.model_json_schema()["properties"]
        assert set(allowed("HTTP")) <= set(properties)
        assert properties["min_p"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
    asked = {"prompt": "x", "seed": -1, "logit_bias": {"5": 1}, "stop": "a", "stop_token_ids": 5, "min_tokens": 2}
    sampling = parse(json.dumps(asked).encode(), CompletionRequest, 10_000).generate_request().sampling
    del asked["prompt"]
    assert SamplingParams(**sampling) == SamplingParams(**asked, max_tokens=16)


@pytest.mark.parametrize(("verb", "without"), [("generate", set()), ("chat", {"logprobs"})])
def test_commands_have_an_option_for_every_parameter_that_the_table_gives_them(verb: str, without: set[str]):
    shown = CliRunner().invoke(commands(), [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for name, rule in TABLE.items():
        flag = rule.flag or "--" + name.replace("_", "-")
        assert (f"{flag} " in shown) == (name in allowed("command line") and name not in without), flag


def test_the_page_of_parameters_is_that_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "run scripts/parameters.py"
