"""What a decode step reads, counted by hand; and that the measurement measures what it says. Never how fast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.engine.engine import Engine
from octavo.errors import OctavoError
from octavo.measure.candidate import Candidate
from octavo.measure.speed import roofline, throughput
from octavo.measure.speed.roofline import bandwidth, cache_bytes, ceilings, read_bytes
from octavo.measure.speed.throughput import Latency, Ratio, check, measure, prompt_length
from octavo.models.bind import BoundModel, bind
from octavo.models.model import Model
from octavo.quant.format import KVFormat

RAW = KVFormat.parse("bf16")


@pytest.fixture(autouse=True)
def small_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "READ_BYTES", 1 << 20)


def test_a_step_reads_every_weight_once_and_an_embedding_of_its_own_not_at_all(
    llama: BoundModel, pamphlet: Model
) -> None:
    assert read_bytes(pamphlet.bound) == sum(p.nbytes for p in pamphlet.bound.hf.parameters())  # tied: read as the head
    everything = sum(p.nbytes for p in llama.hf.parameters())
    assert read_bytes(llama) == everything - llama.hf.get_input_embeddings().weight.nbytes


def test_a_step_reads_the_codes_of_the_whole_context_and_a_window_reads_less(llama: BoundModel) -> None:
    token = 2 * 2 * 8 * 2  # K and V, two heads of 8, two bytes
    assert cache_bytes(llama, RAW, 100) == 2 * 100 * token  # two layers
    assert cache_bytes(llama, KVFormat.parse("int8"), 100) == 100 * token
    windowed = bind(LlamaForCausalLM(LlamaConfig(**llama.hf.config.to_diff_dict())))
    windowed.layers[1] = replace(windowed.layers[1], window=30)
    assert cache_bytes(windowed, RAW, 100) == 130 * token


def test_at_edges_a_step_reads_raw_rows(llama: BoundModel) -> None:
    """Page 0, and half an own span."""
    kv8, shape = KVFormat.parse("kv8"), llama.shapes[0]
    code, raw = shape.token_bytes(kv8), shape.raw_token_bytes(kv8)
    assert code < raw
    assert cache_bytes(llama, kv8, 40) == 2 * 40 * raw
    assert cache_bytes(llama, kv8, 200) == 2 * (104 * code + 96 * raw)
    windowed = bind(LlamaForCausalLM(LlamaConfig(**llama.hf.config.to_diff_dict())))
    windowed.layers[1] = replace(windowed.layers[1], window=150)
    assert cache_bytes(windowed, kv8, 200) == 104 * code + 96 * raw + 104 * code + 46 * raw


def test_a_layer_that_shares_anothers_cache_reads_it_too(llama: BoundModel) -> None:
    shared = bind(LlamaForCausalLM(LlamaConfig(**llama.hf.config.to_diff_dict())))
    shared.layers[1] = replace(shared.layers[1], shape=replace(shared.layers[1].shape, shares=0))
    assert cache_bytes(shared, RAW, 10) == cache_bytes(llama, RAW, 10)


def test_the_ceiling_is_bandwidth_over_bytes(llama: BoundModel) -> None:
    [row] = ceilings(llama, [Candidate("int8", KVFormat.parse("int8"))], [4], [100], 20, 1e9)
    assert row.cache_bytes == 4 * cache_bytes(llama, KVFormat.parse("int8"), 90)
    assert row.decode == pytest.approx(4e9 / (row.weight_bytes + row.cache_bytes))


def test_bandwidth_is_a_positive_number_of_bytes_a_second() -> None:
    assert bandwidth(torch.device("cpu")) > 0


def test_percentiles_are_values_that_were_measured() -> None:
    assert Latency.of([3.0, 1.0, 2.0]) == Latency(2.0, 3.0, 3)
    assert Latency.of([float(i) for i in range(1, 201)]) == Latency(100.0, 198.0, 200)
    assert Ratio.of([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Ratio(2.0, 1.0, 3.0)


def test_every_format_takes_its_turn_and_every_timed_step_decodes_all_sessions(
    pamphlet: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gained: list[int] = []
    step = Engine.step

    def spy(engine: Engine) -> list:  # type: ignore[type-arg]
        found = step(engine)
        gained.append(len(found))
        return found

    monkeypatch.setattr(Engine, "step", spy)
    monkeypatch.setattr(
        throughput, "step_tokens", lambda _: 24
    )  # many steps of prefill, in which the first sessions decode already
    names, tokens, rounds = ["fp32", "int8-token"], 5, 3
    candidates = [Candidate(name, KVFormat.parse(name)) for name in names]
    theory = ceilings(pamphlet.bound, candidates, [3], [64], tokens, 1e9)
    done: list[tuple[int, ...]] = []
    first, second = measure(
        pamphlet, candidates, [3], [64], theory, tokens=tokens, rounds=rounds, progress=lambda *runs: done.append(runs)
    )
    assert done == [(i + 1, 6) for i in range(6)]
    assert [row.kv for row in (first, second)] == names
    for row in (first, second):
        assert row.first_token.n == 3 * rounds
        assert row.per_token.n == tokens * rounds
        assert row.per_token.p99 >= row.per_token.p50 > 0
        assert row.prefill > 0
        assert row.decode > 0
    assert first.decode_ratio == first.prefill_ratio == Ratio(1.0, 1.0, 1.0)
    assert second.decode_ratio.low <= second.decode_ratio.median <= second.decode_ratio.high
    assert first.ceiling == pytest.approx(first.decode / theory[0].decode)
    # The last steps of each run, before the next one's first chunk (which gains less than a full batch).
    full = "".join("x" if n == 3 else "." for n in gained)
    assert full.count("x" * tokens) >= len(names) * rounds


@pytest.mark.parametrize("batch_size", [1, 7, 64, 900])
def test_prompts_leave_room_for_what_early_sessions_decode_while_late_ones_are_computed(batch_size: int) -> None:
    context, tokens = 2048, 32
    prompt = prompt_length(batch_size, context, tokens)
    chunk = throughput.step_tokens(batch_size) - batch_size  # of a step's budget, with everybody else decoding
    assert prompt > 0
    assert prompt + -(-batch_size * prompt // chunk) + tokens <= context


def test_what_cannot_be_measured_is_refused_with_the_numbers(pamphlet: Model) -> None:
    with pytest.raises(OctavoError, match="context of 4096 is beyond the model's 2048"):
        check(pamphlet, [1], [4096], 8)
    with pytest.raises(OctavoError, match=r"no room for a prompt and 64 tokens.*--tokens"):
        check(pamphlet, [1], [32], 64)
