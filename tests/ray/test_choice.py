"""Which replica a request goes to, and what all of them say together; without Ray."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo.cli import main
from octavo.errors import install
from octavo.ray import merged
from octavo.ray.choice import choose
from octavo.ray.keys import key_of
from tests.conftest import status_of

KEYS = [f"{i:016x}" for i in range(400)]
IDLE = dict.fromkeys("abcd", 0)


def home(key: str, loads: dict[str, int] = IDLE) -> str:
    return choose(key, loads, 4)[0][0]


def test_conversations_stay_and_spread_and_few_move_when_a_replica_comes_or_goes():
    """Every key has one home, homes are even, and of five replicas a new or lost one has a fifth of them."""
    homes = {key: home(key) for key in KEYS}
    assert homes == {key: home(key, dict(reversed(IDLE.items()))) for key in KEYS}
    assert all(70 < count < 130 for count in Counter(homes.values()).values())
    grown = {key: home(key, IDLE | {"e": 0}) for key in KEYS}
    moved = [key for key in KEYS if grown[key] != homes[key]]
    assert {grown[key] for key in moved} == {"e"}
    assert 50 < len(moved) < 110
    assert {key: home(key) for key in KEYS} == homes


def test_a_home_with_far_more_to_do_than_others_is_passed_over():
    """Up to `free`, or the bound over the mean, a home keeps its own; beyond, it is one of three choices of the key."""
    key = KEYS[0]
    order = [name for rank in choose(key, IDLE, 4) for name in rank]
    first = order[0]
    assert choose(key, IDLE | {first: 3}, 4)[0] == [first]
    assert choose(key, dict.fromkeys("abcd", 9), 4)[0] == [first]
    assert choose(key, IDLE | {first: 4}, 4) == [order[:3], order[3:]]


def test_without_a_key_any_two_replicas_are_the_choice():
    seen = Counter(name for i in range(200) for name in choose("", IDLE, 4, random.Random(i))[0])
    assert set(seen) == set(IDLE)
    assert sum(seen.values()) == 400
    assert choose("", {"a": 0}, 4)[0] == ["a"]


FIRST = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
LATER = [*FIRST, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "How are you?"}]


@pytest.mark.parametrize(
    ("first", "later", "other"),
    [
        ({"messages": FIRST}, {"messages": LATER}, {"messages": [{"role": "user", "content": "Hello"}]}),
        ({"system": "A", "messages": FIRST[1:]}, {"system": "A", "messages": LATER[1:]}, {"messages": FIRST[1:]}),
        ({"prompt": "ab" * 200}, {"prompt": "ab" * 200 + "more"}, {"prompt": "ac" * 200}),
        ({"prompt": [1] * 70}, {"prompt": [1] * 200}, {"prompt": [2] * 70}),
        ({"input": FIRST[1:]}, {"input": LATER[1:]}, {"input": [{"role": "user", "content": "Bye"}]}),
    ],
)
def test_all_turns_of_a_conversation_have_one_key(first: dict, later: dict, other: dict):
    assert len(key_of(first)) == 16
    assert key_of(first) == key_of(later) != key_of(other)


def test_a_response_that_is_gone_on_with_bears_the_key_of_its_first_request():
    key = key_of({"input": "Tell me a story."})
    assert key_of({"input": "Go on.", "previous_response_id": f"resp_{key}{'0' * 32}"}) == key
    assert key_of({"input": "Go on.", "previous_response_id": f"resp_{'0' * 32}"}) == ""


@pytest.mark.parametrize("body", [[], None, 3, {}, {"prompt": "short"}, {"prompt": []}, {"previous_response_id": "x"}])
def test_what_has_no_beginning_of_its_own_has_no_key(body: object):
    assert key_of(body) == ""


def test_metrics_of_replicas_are_one_text_that_prometheus_reads():
    """Each sample has its replica's name, and the lines of a family stand together."""
    text = '# HELP a_total A.\n# TYPE a_total counter\na_total{route="/x"} 2.0\n# HELP b B.\n# TYPE b gauge\nb 1.5\n'
    families = list(text_string_to_metric_families(merged.metrics({"r1": text, "r2": text})))
    assert [family.name for family in families] == ["a", "b"]
    samples = [(s.name, s.labels["replica"], s.value) for family in families for s in family.samples]
    assert samples == [("a_total", "r1", 2), ("a_total", "r2", 2), ("b", "r1", 1.5), ("b", "r2", 1.5)]


def test_the_caches_of_replicas_add_up_but_for_what_they_share():
    own = {"model": "m", "block_bytes": 8, "blocks_total": 3, "sessions_saved": 2, "restored_tokens": None}
    found = merged.cache({"r1": own, "r2": own | {"sessions_saved": 1}})
    assert found["replicas"][1] == {"replica": "r2", **own, "sessions_saved": 1}
    assert {name: found[name] for name in own} == own | {"blocks_total": 6}


@pytest.mark.slow
def test_ray_is_imported_by_nothing_that_does_not_ask_for_it():
    """Neither the command line, the server nor an LLM; and the keys and the choice need none of it either. Who deploys
    replicas, and the ingress, need no torch."""
    modules = "octavo.cli, octavo.llm, octavo.serve.server, octavo.serve.app, octavo.measure, octavo.ray.choice"
    for imported, absent in ((modules, "ray"), ("octavo.ray.application", "torch")):
        code = f"import sys, {imported}; print({absent!r} in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "False\n", imported


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "--replicas", "2"],
        ["generate", "--input", "*.jsonl", "--output", "out", "--ray", "local"],
        ["calibrate", "--ray", "local"],
        ["accuracy", "--ray", "local"],
    ],
)
def test_without_ray_one_line_says_how_to_install_it(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The command that it gives is that of a checkout, and no model is loaded before."""
    monkeypatch.setattr("octavo.ray.cluster.find_spec", lambda _: None)
    assert status_of(*command) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "ray" in said[0]
    assert said[0].endswith(install("ray"))
    assert "[ray]" in said[0]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["serve", "--replicas", "2", "--uds", "here"], "--uds"),
        (["calibrate", "--replicas", "2"], "--ray"),
        (["generate", "--ray", "local", "--input", "-", "--output", "out"], "--input"),
        (["generate", "--replicas", "2", "--prompt", "Hello"], "--ray"),
    ],
)
def test_what_goes_not_together_is_refused(command: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(command)
    assert says in capsys.readouterr().err
