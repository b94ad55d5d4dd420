"""Looking up values: the questions can be answered from the context alone, and what is counted is what was lost."""

from __future__ import annotations

import pytest

from octavo.measure.accuracy.retrieval import DEPTHS, make_context, retrieve
from octavo.measure.candidate import Candidate
from octavo.models.model import Model
from octavo.quant.format import KVFormat


def test_every_question_has_its_answer_in_the_context_and_all_fit_its_length(pamphlet: Model) -> None:
    """The key stands there once, with the value; questions are spread over all of the context."""
    asked = make_context(pamphlet.tokenizer, 900, questions=8)
    text = pamphlet.tokenizer.decode(asked.tokens)
    assert len(asked.questions) == 8
    for context, value in asked.questions:
        key = pamphlet.tokenizer.decode(context[len(asked.tokens) :]).strip()
        assert text.count(key) == 1
        assert text.split(key)[1].split()[0] == pamphlet.tokenizer.decode(value).strip()
        assert len(context) + len(value) <= 900
    assert {int(DEPTHS * depth) for depth in asked.depths} == set(range(DEPTHS))
    assert make_context(pamphlet.tokenizer, 900, questions=8) == asked, "the same for all formats and runs"


def test_a_format_is_compared_with_the_baseline_question_by_question(pamphlet: Model) -> None:
    """The baseline beside itself changes nothing; a coarser cache changes how likely values are."""
    asked = make_context(pamphlet.tokenizer, 512, questions=8)
    fp32, coarse = (Candidate(name, KVFormat.parse(name)) for name in ("fp32", "int8-token"))
    base, again, own = retrieve(pamphlet, [fp32, fp32, coarse], asked, 512)
    assert (again.change, again.change_error, again.lost, again.gained) == (0, 0, 0, 0)
    assert own.change != 0
    assert own.right == pytest.approx(base.right - (own.lost - own.gained) / 8)
    assert base.right == pytest.approx(sum(base.right_by_depth) / DEPTHS)
