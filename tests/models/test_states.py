"""Layers that keep states: which are found, what they have to show before their model is served, and what they take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octavo.cache.size import CacheSize
from octavo.cache.states import StatePlan, StatePool, StateShape
from octavo.errors import Unsupported
from octavo.models.bind import bind
from octavo.models.geometry import Geometry
from octavo.models.states import Found, install, prove
from octavo.models.states.mixers import Mixer
from octavo.quant.format import KVFormat
from octavo.recurrences import cpu
from tests.models import zoo

WIDTH = 8


class Summing(nn.Module):
    """A recurrence of one state: what it was, halved, and the row. `fault` is what it does wrong."""

    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault = fault

    def forward(self, hidden_states: Tensor, cache_params: object = None) -> Tensor:
        state = cache_params.get_recurrent_state(0) if cache_params is not None else None  # type: ignore[attr-defined]
        if state is None or (self.fault == "forgets chunks" and hidden_states.shape[1] > 1):
            state = torch.zeros(len(hidden_states), WIDTH)
        if self.fault == "forgets":
            state = torch.zeros_like(state)
        if self.fault == "mixes" and cache_params is not None:
            state = state + hidden_states.mean((0, 1))
        out = []
        for row in hidden_states.unbind(1):
            state = state / 2 + row
            out.append(state)
        if cache_params is not None:
            cache_params.update_recurrent_state(state, 0)  # type: ignore[attr-defined]
        return torch.stack(out, 1)


def found(fault: str = "") -> Found:
    shape = StateShape("recurrent", 0, (WIDTH,), torch.float32, torch.device("cpu"))
    mixer = Mixer(0, 0, (shape,), ["hidden_states", "cache_params"], "cache_params", "hidden_states")
    one = Found(Summing(fault), mixer, torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(0)), {})
    install([one])
    return one


def test_a_mixer_that_keeps_its_states_apart_is_served():
    one = found()
    prove("it", [one])
    assert not one.mixer.by_token


def test_a_mixer_whose_chunks_forget_is_given_them_token_by_token():
    """transformers' selective scan of several tokens begins anew, whatever the cache holds."""
    one = found("forgets chunks")
    prove("it", [one])
    assert one.mixer.by_token


@pytest.mark.parametrize(("fault", "reason"), [("forgets", "token by token"), ("mixes", "mixes the sequences")])
def test_a_mixer_that_computes_something_else_is_refused(fault: str, reason: str):
    with pytest.raises(Unsupported, match=reason):
        prove("it", [found(fault)])


@pytest.mark.skipif(cpu.extension.unavailable is not None, reason=str(cpu.extension.unavailable))
@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid", "lfm2", "falcon_h1", "kimi_linear", "jamba"])
def test_native_kernels_know_the_recurrence(name: str):
    """Each of transformers' recurrences is computed for all rows of a step at once."""
    bound = bind(zoo.build(name))
    assert [mixer.native is not None for mixer in bound.mixers] == [True] * len(bound.states.layers)


@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid", "lfm2", "falcon_h1", "jamba", "mamba2"])
def test_a_model_that_computes_in_bf16_is_served(name: str):
    """Whatever the processor: what its mixers are shown has the type that they compute in."""
    bound = bind(zoo.build(name).bfloat16())
    assert len(bound.mixers) == len(bound.states.layers) > 0


@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid", "lfm2", "falcon_h1", "mamba2"])
def test_a_config_alone_tells_what_a_session_takes(name: str, tmp_path: Path):
    """Traced without values, a model's rows and states have the sizes that they have when it is bound."""
    hf = zoo.build(name)
    (tmp_path / "config.json").write_text(json.dumps(hf.config.to_dict() | {"dtype": "float32"}))
    geometry, bound = Geometry.trace(tmp_path), bind(hf)
    own, traced = (CacheSize.of(of.shapes, KVFormat.parse("kv8"), states=of.states) for of in (bound, geometry))
    assert own == traced
    assert own.states == bound.states.nbytes > 0
    assert own.session(64) == own.states + own.session(0) - own.states + own.blocks(64) * own.block


def test_a_model_of_states_alone_has_no_rows():
    bound = bind(zoo.build("mamba2"))
    assert not bound.shapes
    assert CacheSize.of([], KVFormat.parse("kv8"), states=bound.states).token == 0


def test_slots_are_cleared_copied_and_saved_whole():
    """A slot is one row of memory, and an owner's alone."""
    device = torch.device("cpu")
    half, whole = torch.bfloat16, torch.float32
    convolution, recurrence = (
        StateShape("conv", 0, (3, 4), half, device),
        StateShape("recurrent", 0, (5,), whole, device),
    )
    plan = StatePlan(((convolution, recurrence), (StateShape("recurrent", 0, (2, 2), whole, device),)))
    pool, other = StatePool(plan, 3), StatePool(plan, 1)
    assert pool.nbytes == 4 * plan.nbytes
    a, b = pool.take(), pool.take()
    for layer in pool.layers:
        for number, state in enumerate(layer.values()):
            state[a] = number + 1
    pool.copy(a, b)
    for name, state in other.of(0).items():
        state.copy_(pool.of(a)[name])
    pool.clear(a)
    assert all(not state[a].any() for layer in pool.layers for state in layer.values())
    assert all(torch.equal(state[b], theirs[0]) for layer, same in zip(pool.layers, other.layers, strict=True)
               for state, theirs in zip(layer.values(), same.values(), strict=True))  # fmt: skip
    for name, state in pool.of(a).items():
        state.copy_(other.of(0)[name])
    assert all(torch.equal(state[a], state[b]) for layer in pool.layers for state in layer.values())
    pool.free(a)
    assert pool.take() == a
    assert all(not state[a].any() for layer in pool.layers for state in layer.values())
