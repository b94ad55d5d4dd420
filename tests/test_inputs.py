"""What users of vLLM's LLM pass is taken, in one form; anything else is refused in one sentence naming the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.inputs import read_conversations, read_params, read_prompts

HI = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (range(3), [[0, 1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([[1, 2], "a", (3,)], [[1, 2], "a", [3]]),
        ({"prompt": "a"}, ["a"]),
        ({"prompt_token_ids": [1, 2]}, [[1, 2]]),
        ([{"prompt": "a"}, {"prompt_token_ids": (1,)}, "b"], ["a", [1], "b"]),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_prompts_are_text_token_ids_dicts_and_lists_of_these(given: Any, prompts: list[Any]):
    assert read_prompts(given) == prompts


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, r"prompts has the keys \[\]; it must be text, token ids, or a dict"),
        (b"hi", r"prompts is b'hi'; it must be text"),
        (None, "prompts is None; it must be text"),
        (5, "prompts is 5; it must be text"),
        (True, "prompts is True; it must be text"),
        ({"a", "b"}, "prompts is {.*}; it must be text"),
        ({"prompt": "a", "multi_modal_data": 1}, "prompts has the keys .*multi_modal_data"),
        ({"prompt": [1]}, r"prompts\['prompt'\] is \[1\]"),
        ({"prompt_token_ids": "a"}, r"prompts\['prompt_token_ids'\] is 'a'"),
        (["a", 1], r"prompts\[1\] is 1; it must be text"),
        (["a", b"b"], r"prompts\[1\] is b'b'"),
        ([1, "a"], r"prompts\[1\] is 'a'; a prompt that is a list holds token ids"),
        ([[1.0]], r"prompts\[0\]\[0\] is 1\.0"),
        ([[True]], r"prompts\[0\]\[0\] is True"),
        ("half \ud800", "prompts holds half of a surrogate pair"),
    ],
)
def test_other_prompts_are_refused_by_their_place(given: Any, reason: str):
    with pytest.raises(OctavoError, match=f"^{reason}"):
        read_prompts(given)


def test_parameters_are_one_for_all_or_one_for_each():
    one, other, default = SamplingParams(max_tokens=1), SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)
    assert read_params(None, 2, lambda: default) == [default] * 2
    assert read_params(one, 2, lambda: default) == [one] * 2
    assert read_params((one, other), 2, lambda: default) == [one, other]
    with pytest.raises(OctavoError, match="3 prompts but 2 sampling parameters"):
        read_params([one, other], 3, lambda: default)
    for wrong in ({"max_tokens": 5}, [{"max_tokens": 5}], "greedy", 5):
        with pytest.raises(OctavoError, match=r"^sampling_params is .*; it must be SamplingParams"):
            read_params(wrong, 1, lambda: default)


def test_a_conversation_and_a_list_of_conversations_are_told_apart_and_parts_become_text():
    assert read_conversations([HI]) == ([[HI]], True)
    assert read_conversations([[HI], [HI, HI]]) == ([[HI], [HI, HI]], False)
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    assert read_conversations([parts]) == ([[HI]], True)
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert read_conversations([called]) == ([[called]], True)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], r"messages is \[\]"),
        ("Hi", "messages is 'Hi'; it must be a list of messages"),
        (HI, "messages is {.*}; it must be a list of messages"),
        ([HI, "Hi"], r"messages\[1\] is 'Hi'; it must be a message"),
        ([[HI], HI], r"messages\[1\] is {.*}; it must be a list of messages"),
        ([[HI], []], r"messages\[1\] is \[\]"),
        ([{"content": "Hi"}], r"messages\[0\] is {.*}; it must be a message"),
        ([{"role": "user"}], r"messages\[0\]\['content'\] is None"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\] is 5"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\['content'\]\[0\] is of type 'image_url': Octavo serves text alone",
        ),
    ],
)
def test_other_messages_are_refused_by_their_place(given: Any, reason: str):
    with pytest.raises(OctavoError, match=f"^{reason}"):
        read_conversations(given)
