"""Every architecture that transformers knows is exact through Octavo or refused at load; none is wrong in silence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers

from octavo.models.bind import bind
from scripts.architectures import PAGE, page
from tests.models import zoo
from tests.models.probe import TOLERANCE, largest_error, probe


@pytest.mark.parametrize("name", zoo.names())
def test_exact_or_refused(name: str) -> None:
    outcome = probe(name)
    assert outcome.verdict != "wrong", f"accepted, but off by {outcome.error:.1e}; it has {outcome.features}"
    assert outcome.verdict == "exact" or outcome.reason


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("llama", {"scale": 0.9 * 8**-0.5}),
        ("mistral", {"window": None}),
        ("mistral", {"window": zoo.WINDOW + 1}),
        ("phimoe", {"window": None}),
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"sinks": None}),
    ],
)
def test_the_probe_sees_a_wrong_spec(name: str, broken: dict[str, Any]) -> None:
    """What makes the test above worth its name: a feature that goes missing shows in tiny random models too."""
    bound = bind(zoo.build(name))
    bound.layers = [replace(layer, **broken) for layer in bound.layers]
    assert largest_error(name, bound) > 30 * TOLERANCE


def test_the_page_is_what_the_probe_finds() -> None:
    text = PAGE.read_text()
    if f"transformers {transformers.__version__}." not in text:
        pytest.skip(f"{PAGE.name} was made with another version of transformers than {transformers.__version__}")
    assert text == page([probe(name) for name in zoo.names()]), "run scripts/architectures.py"
