"""The simulation of routing: the same every time, and it finds what routing by prefix is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import fleet

    return fleet


def test_routing_by_prefix_finds_more_than_twice_the_blocks_and_alike_every_time(fleet: Any):
    """Eight replicas for half a minute. A late answer moves a conversation's next turn past the end, so policies get
    nearly as many requests."""
    found = {name: fleet.simulate(8, name, 30.0) for name in fleet.POLICIES}
    assert found["prefix"] == fleet.simulate(8, "prefix", 30.0)
    hits = {name: row["hit_rate"] for name, row in found.items()}
    assert hits.pop("prefix") > 2 * max(hits.values())
    requests = [row["requests"] for row in found.values()]
    assert max(requests) - min(requests) <= 0.05 * max(requests)


def test_one_replica_answers_alike_whatever_the_policy(fleet: Any):
    rows = [{**fleet.simulate(1, name, 60.0), "policy": ""} for name in fleet.POLICIES]
    assert all(row == rows[0] for row in rows)
