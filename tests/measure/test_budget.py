"""A budget: how it is written, what fits into it, and that what was cut is said."""

from __future__ import annotations

from time import perf_counter

import pytest

from octavo.errors import OctavoError
from octavo.measure.budget import NO_LIMIT, Budget, Windows, duration
from octavo.measure.pace import Pace
from octavo.models.model import Model


def tokens(size: Windows) -> float:
    """A model that reads a token a second."""
    return float(size.tokens)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2m", 120), ("90s", 90), ("1h30m", 5400), ("0.5h", 1800), ("none", None)]
)
def test_times_are_written_as_people_write_them(text: str, seconds: float | None) -> None:
    assert Budget.parse(text).seconds == seconds


@pytest.mark.parametrize("text", ["2", "two", "2 m", "-1m", "0s", ""])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(OctavoError, match="write a time like"):
        Budget.parse(text)


def test_what_fits_is_not_cut() -> None:
    fit = Budget.parse("1h").fit(Windows(8, 256), Windows(2, 64), tokens)
    assert str(fit) == "8 windows of 256 tokens, about 34 min 10 s"
    assert NO_LIMIT.fit(Windows(99, 256), Windows(2, 64), tokens).size == Windows(99, 256)


def test_windows_become_fewer_before_they_become_shorter_and_that_is_said() -> None:
    fit = Budget.parse("20m").fit(Windows(8, 256), Windows(2, 64), tokens)
    assert fit.size == Windows(4, 256)
    assert fit.of(3).endswith("in 3 formats, about 17 min: cut from 8 of 256 to fit --budget 20m")
    assert Budget.parse("5m").fit(Windows(8, 256), Windows(2, 64), tokens).size == Windows(2, 128)


def test_no_less_is_measured_than_says_something() -> None:
    fit = Budget.parse("1s").fit(Windows(8, 256), Windows(2, 64), tokens)
    assert fit.size == Windows(2, 64)
    assert str(fit).endswith("to fit --budget 1s; no fewer would do")
    asked = Budget.parse("1s").fit(Windows(8, 256), Windows(8, 256), tokens)
    assert str(asked).endswith("beyond --budget 1s"), "what the user asks for is done, and said"


def test_a_budget_is_over_when_its_time_has_passed() -> None:
    begun = perf_counter() - 60
    assert [budget.over(begun) for budget in (Budget.parse("59s"), Budget.parse("2m"), NO_LIMIT)] == [
        True,
        False,
        False,
    ]


def test_durations_are_as_exact_as_estimates() -> None:
    assert [duration(s) for s in (0.2, 42, 64, 119, 5100, 7200)] == [
        "1 s",
        "42 s",
        "1 min",
        "2 min",
        "1 h 25 min",
        "2 h",
    ]


def test_a_models_pace_is_measured_in_seconds_and_grows_with_the_work(pamphlet: Model) -> None:
    pace = Pace.measure(pamphlet.bound, 128)
    assert 0 < pace.read(100) <= pace.read(100, logits=True) < pace.read(1000, logits=True)
    assert 0 < pace.write(1, 10) <= pace.write(16, 10)
