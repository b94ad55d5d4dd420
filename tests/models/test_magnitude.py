"""Weights whose V or K is tiny or huge are served by token formats as well as others, without a calibration."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from octavo.engine.params import SamplingParams
from octavo.engine.reading import Reading
from octavo.llm import LLM
from octavo.models.bind import BoundModel
from octavo.models.model import Model
from octavo.quant.format import KVFormat


def scaled(llama: BoundModel, exponent: int) -> Model:
    """The same function, whose V is 2^exponent as large."""
    hf = copy.deepcopy(llama.hf)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.v_proj.weight.mul_(2.0**exponent)
            layer.self_attn.o_proj.weight.mul_(2.0**-exponent)
    return Model.of(hf, Path("scaled"))


@pytest.mark.parametrize("kv", ["int8-token", "int8-token+edges", "int4-token"])
@pytest.mark.parametrize("exponent", [-20, -10, 12, 24])
def test_a_power_of_two_in_v_changes_no_code_and_no_answer(llama: BoundModel, exponent: int, kv: str):
    ids = llama.random_tokens(200)
    plain, model = scaled(llama, 0), scaled(llama, exponent)
    assert all(shape.exponents == (0, 0) for shape in plain.bound.shapes)
    expected, found = (
        torch.cat(list(Reading(one.bound, KVFormat.parse(kv)).logits(ids))).log_softmax(-1) for one in (plain, model)
    )
    exact = torch.cat(list(Reading(plain.bound, KVFormat.parse("fp32")).logits(ids))).log_softmax(-1)
    assert (found - exact).abs().mean() < 1.2 * (expected - exact).abs().mean()


def test_values_outside_the_table_are_said_at_the_first_answer_and_once(llama: BoundModel, recwarn):
    """A token after the ones that were looked at whose V is far larger than theirs."""
    model = scaled(llama, 0)
    llm = LLM(model, "int8-token", session_len=128, max_batch_size=1)
    with torch.no_grad():
        for layer in model.bound.hf.model.layers:
            layer.self_attn.v_proj.weight.mul_(2.0**16)
            layer.self_attn.o_proj.weight.mul_(2.0**-16)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    model.tokenizer = WORDS
    with pytest.warns(UserWarning, match="of the values in V of layer . are larger than int8-token can say here"):
        llm.generate([model.bound.random_tokens(40)], params)
    recwarn.clear()
    llm.generate([model.bound.random_tokens(40)], params)
    assert not [one for one in recwarn if "larger than" in str(one.message)]


class Words:
    """As much of a tokenizer as an answer needs."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(33 + i) for i in ids)


WORDS = Words()
