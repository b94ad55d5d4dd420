"""`octavo plan --fleet`: the arithmetic against its own inversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from octavo.errors import OctavoError
from octavo.measure.memory.fleet import Gpu, Wanted, fleets
from octavo.models.geometry import Geometry
from octavo.quant.format import KVFormat

INTERNLM = Path(__file__).parents[3] / "benchmarks" / "geometries" / "internlm-chat-7b.json"
FORMATS = [KVFormat.parse(name) for name in ("fp16", "int8", "kv4")]
WANTED = Wanted(sessions=1000, context=2048, tokens_per_second=5000)


@pytest.fixture(scope="module")
def internlm() -> Geometry:
    return Geometry.trace(INTERNLM)


def test_a_fleet_holds_all_sessions_and_reaches_the_rate_with_no_replica_too_many(internlm: Geometry):
    """Checked by what the replicas hold and do, and by one replica fewer."""
    for fleet in fleets(internlm, FORMATS, WANTED):
        assert fleet.replicas * fleet.sessions >= WANTED.sessions
        assert fleet.most >= WANTED.tokens_per_second
        assert fleet.replicas * fleet.running / fleet.step >= WANTED.tokens_per_second
        if fleet.ranks == 1:
            assert (fleet.replicas - 1) * fleet.sessions < WANTED.sessions
        room = 0.9 * Gpu().memory * fleet.ranks - fleet.weight_bytes * fleet.ranks
        assert fleet.sessions * fleet.session_bytes <= room


def test_half_the_bytes_of_a_session_need_about_half_the_gpus(internlm: Geometry):
    raw, int8, _ = (fleet.gpus for fleet in fleets(internlm, FORMATS, WANTED) if fleet.weights == "fp16")
    assert raw / 2 <= int8 <= raw / 2 + 1


def test_a_rate_beyond_what_sessions_need_takes_more_replicas(internlm: Geometry):
    few, many = (
        fleets(internlm, FORMATS[1:2], replace(WANTED, tokens_per_second=rate))[0].replicas for rate in (1000, 60000)
    )
    assert many > few


def test_a_model_larger_than_a_gpu_is_divided_and_one_that_no_machine_holds_is_refused(internlm: Geometry):
    small = Gpu(memory=12 * 10**9)
    assert {fleet.ranks > 1 for fleet in fleets(internlm, FORMATS, WANTED, small) if fleet.weights == "fp16"} == {True}
    with pytest.raises(OctavoError, match="more --memory"):
        fleets(internlm, FORMATS, WANTED, Gpu(memory=10**8))


def test_a_model_is_divided_as_its_heads_allow(internlm: Geometry):
    """By numbers of GPUs that serving it takes; one without a plan is not divided."""
    assert internlm.ranks == (1, 2, 4, 8, 16, 32)
    small, four = Gpu(memory=12 * 10**9), replace(internlm, ranks=(1, 4))
    assert {fleet.ranks for fleet in fleets(four, FORMATS, WANTED, small)} <= {1, 4}
    with pytest.raises(OctavoError, match="no replica of 1 such GPUs"):
        fleets(replace(internlm, ranks=(1,)), FORMATS, WANTED, Gpu(memory=3 * 10**9))
