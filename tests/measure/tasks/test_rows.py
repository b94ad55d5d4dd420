"""Rows of the table of tasks: what they are of, and whether the model solves it."""

from __future__ import annotations

import pytest

from octavo.measure.tasks import BENCHMARKS
from octavo.measure.tasks.results import Result
from octavo.measure.tasks.rows import row


def result(name: str, right: list[float]) -> Result:
    items = [{"prompt": str(i), BENCHMARKS[name].metric: value} for i, value in enumerate(right)]
    return Result({}, items, 0.0, len(items))


def test_differences_are_paired_and_a_score_above_guessing_is_solved() -> None:
    """One item of four differs: the error is that of the differences, not of the scores."""
    found = row(
        BENCHMARKS["winogrande"],
        ["bf16", "kv8"],
        {"bf16": [result("winogrande", [1, 1, 1, 1])], "kv8": [result("winogrande", [1, 0, 1, 1])]},
    )
    assert (found.name, found.solved) == ("winogrande", True)
    assert (found.differences["kv8"], found.difference_errors["kv8"]) == pytest.approx((-25, 25))


def test_a_row_of_some_subsets_says_how_many_and_not_what_guessing_gives() -> None:
    """The chance level is that of all subsets together."""
    parts = [result("bbh", [1, 0]), result("bbh", [1, 1])]
    found = row(BENCHMARKS["bbh"], ["bf16", "kv8"], {"bf16": parts, "kv8": parts})
    assert (found.name, found.items, found.guess, found.solved) == ("bbh (2 of 27)", 4, None, None)
