"""Every architecture that transformers knows is exact through Octavo or refused at load; none is wrong in silence.
Whatever form a model is given in, it computes what transformers computes from the weights it stands for.

What docs/ARCHITECTURES.md tells is measured here, once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers

from octavo.models.bind import bind
from scripts.architectures import PAGE, page
from tests.conftest import slow
from tests.models import recurrent, zoo
from tests.models.forms import FORMS, measure
from tests.models.probe import TOLERANCE, largest_error, probe

PARTS = 16
PACKED = ("GGUF, Q4_0", "AWQ", "GPTQ", "compressed-tensors")  # activations have 15 bits of their group's largest


@pytest.mark.parametrize("part", [0, *slow(*range(1, PARTS))])
def test_exact_or_refused(part: int) -> None:
    """In parts, for their names are known only once transformers has imported all of them, which takes long. The page
    has all."""
    outcomes = [probe(name) for name in zoo.names()[part::PARTS]]
    assert not [outcome for outcome in outcomes if outcome.verdict == "wrong"], "accepted, but far off"
    assert all(outcome.reason for outcome in outcomes if outcome.verdict == "refused")


@pytest.mark.parametrize("name", FORMS)
def test_a_form_computes_what_its_weights_stand_for(name: str) -> None:
    found = measure(name)
    assert found.tokens
    assert found.error < (2e-3 if name.startswith(PACKED) else 1e-4)


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
    assert largest_error(zoo.build(name), bound) > 30 * TOLERANCE


@pytest.mark.parametrize("name", ["nemotron_h", "zamba2"])
def test_where_transformers_own_steps_differ_from_its_own_forward_ours_are_the_forwards(name: str) -> None:
    """Its steps of one token leave out the least time step, which its forward over several tokens keeps."""
    found = recurrent.measure(name)
    assert found.error < recurrent.NEAR < found.own
    assert found.by_token == pytest.approx(found.own, abs=recurrent.NEAR)


@pytest.mark.slow
def test_the_page_is_what_the_probe_finds() -> None:
    text = PAGE.read_text()
    if f"transformers {transformers.__version__}." not in text:
        pytest.skip(f"{PAGE.name} was made with another version of transformers than {transformers.__version__}")
    assert text == page([probe(name) for name in zoo.names()]), "run scripts/architectures.py"
