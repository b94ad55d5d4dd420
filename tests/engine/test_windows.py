"""Layers with a sliding window keep what a query still sees and nothing else; answers are what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from octavo.cache.size import CacheSize
from octavo.engine.params import SamplingParams
from octavo.engine.scheduler import CHUNK_TOKENS
from octavo.engine.sequence import Sequence
from octavo.llm import LLM
from octavo.models.model import Model
from octavo.quant.format import KVFormat
from tests.engine.shadow import Shadow

WINDOW = 100
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "initializer_range": 0.3, "tie_word_embeddings": False, "eos_token_id": None,
    "bos_token_id": None, "sliding_window": WINDOW,
}  # fmt: skip
ALL = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=0)


def build(kind: str) -> PreTrainedModel:
    """`sliding`: every layer has the window; `mixed`: the last of three layers sees all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "sliding":
            return MistralForCausalLM(MistralConfig(num_hidden_layers=2, **SIZES)).float().eval()
        layers = ["sliding_attention", "sliding_attention", "full_attention"]
        config = Qwen2Config(num_hidden_layers=3, layer_types=layers, use_sliding_window=True, **SIZES)
        return Qwen2ForCausalLM(config).float().eval()


@pytest.fixture(scope="module", params=["sliding", "mixed"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model.of(build(request.param), Path(request.param))


@pytest.fixture(scope="module")
def words(model: Model) -> list[int]:
    return model.bound.random_tokens(700)


def ask(llm: LLM, *prompts: list[int], tokens: int = 60) -> list[tuple[list[int], int]]:
    """Each answer's tokens, and how many of its prompt's were cached."""
    sequences = [Sequence(p, SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=0)) for p in prompts]
    for sequence in sequences:
        llm.engine.add(sequence)
    while llm.engine.busy:
        llm.engine.step()
        llm.engine.scheduler.check()
    return [(sequence.output, sequence.prefix_hit) for sequence in sequences]


def test_the_layers_are_groups_by_how_far_they_see(model: Model):
    cache = LLM(model, "fp32", session_len=1024, max_batch_size=2).cache
    assert cache.reaches == ([WINDOW] if model.name == "sliding" else [None, WINDOW])
    assert cache.blocks[-1] < 2 * 1024 // 64 + 30


def test_answers_are_those_of_eager_attention_with_its_mask(model: Model, words: list[int]):
    """Prompts and answers far longer than the window, in one step and in small ones."""
    hf = build(model.name)
    hf.set_attn_implementation("eager")
    for chunk in (1024, 50):
        llm = LLM(model, "fp32", session_len=1024, max_batch_size=2, max_batch_tokens=chunk)
        for prompt in (words[:500], words[:30]):
            sequence = Sequence(prompt, ALL)
            llm.engine.add(sequence)
            while llm.engine.busy:
                llm.engine.step()
                llm.engine.scheduler.check()
            with torch.inference_mode():
                logits = hf(input_ids=torch.tensor([sequence.tokens]), use_cache=False).logits[0]
            expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            assert sequence.output == expected.argmax(-1).tolist()
            found = torch.tensor([sampled.logprob for sampled in sequence.sampled])
            assert (found - expected.amax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("kv", ["fp32", "int8-token", "int8-token+edges"])
def test_a_prefix_hit_and_a_preemption_change_no_answer(model: Model, words: list[int], kv: str):
    cold = LLM(model, kv, session_len=1024, max_batch_size=4, prefix_caching=False)
    prompts = [words[:400], [*words[:330], 1, 2, 3], words[300:]]
    expected = [ask(cold, prompt)[0][0] for prompt in prompts]
    warm = LLM(model, kv, session_len=1024, max_batch_size=4)
    assert [answer for answer, _ in ask(warm, *prompts)] == expected
    again = ask(warm, *prompts)
    assert [answer for answer, _ in again] == expected
    assert again[0][1] == 384  # the window before the prompt's end was still there
    if model.name == "mixed":  # group 0 is what can be too small
        size = CacheSize.of(model.bound.shapes, KVFormat.parse(kv), step=CHUNK_TOKENS)
        small = LLM(model, kv, session_len=1024, max_batch_size=4, kv_cache_memory=size.cache(14, 4))
        assert [answer for answer, _ in ask(small, *prompts)] == expected


@pytest.mark.parametrize("kv", ["fp32", "int8-token+edges"])
def test_a_saved_session_goes_on_as_the_one_that_stayed(
    model: Model, words: list[int], kv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Model, "fingerprint", "sha256:a test")
    stayed = LLM(model, kv, session_len=1024, max_batch_size=1)
    [(answer, _)] = ask(stayed, words[:400])
    tokens = words[:400] + answer
    kept = stayed.save(tmp_path / "s", tokens)
    [(expected, hit)] = ask(stayed, [*tokens, 5])
    back = LLM(model, kv, session_len=1024, max_batch_size=1)
    assert back.restore(tmp_path / "s").cached_tokens == kept == hit == 448
    assert ask(back, [*tokens, 5]) == [(expected, hit)]
    longer = LLM(model, kv, session_len=1024, max_batch_size=1)
    longer.restore(tmp_path / "s")
    assert ask(longer, words[:200])[0][0] == ask(stayed, words[:200])[0][0]  # a window of its middle is not in the file


def test_a_long_answer_takes_the_blocks_of_its_window_and_no_more(model: Model, words: list[int]):
    check_long_answer(model, words, 600)


@pytest.mark.slow
def test_an_answer_of_20_000_tokens_takes_the_blocks_of_its_window_and_no_more(slowly: Callable[[int], int]):
    model = Model.of(build("sliding"), Path("sliding"))
    check_long_answer(model, model.bound.random_tokens(300), max(2_000, slowly(20_000)))


def check_long_answer(model: Model, words: list[int], tokens: int) -> None:
    llm = LLM(model, "int8-token", session_len=32768, max_batch_size=1)
    windowed = llm.engine.pool.groups[-1]
    sequence = Sequence(words[:300], SamplingParams(max_tokens=tokens, ignore_eos=True))
    llm.engine.add(sequence)
    most = 0
    while llm.engine.busy:
        llm.engine.step()
        most = max(most, windowed.used if len(sequence.output) > 1 else 0)
    assert len(sequence.output) == tokens
    assert most == 3  # 99 rows before the query's own lie in three blocks at most
    if model.name == "sliding":
        assert llm.cache.nbytes < 64 * llm.cache.size.block


def test_sizes_count_a_window_once(model: Model):
    whole = LLM(model, "fp32", session_len=2048, max_batch_size=3)
    size = replace(whole.cache.size, step=CHUNK_TOKENS)
    slack = 64 * len(whole.cache.stores)  # after the last block, at most
    assert 0 <= whole.cache.nbytes - size.cache(3 * 32, 3) <= slack
    sliding = size.groups[-1].block
    assert size.session(2048) == 3 * sliding + (0 if model.name == "sliding" else 32 * size.groups[0].block)
    assert size.session(64) == size.block
    assert size.session(20_000) - size.session(2048) == (0 if model.name == "sliding" else 281 * size.groups[0].block)


@pytest.mark.parametrize("narrow", [False, True])
def test_whatever_happens_a_query_sees_what_was_written_for_its_prefix(narrow: bool):
    """Random prompts of two letters, in caches that run out, checked at every step and slot (shadow.py)."""
    generator = torch.Generator().manual_seed(int(narrow))
    for _ in range(6):
        shadow = Shadow(blocks=14, batch=3, budget=12, context=40, reach=None if narrow else 7, windows=(3,) * narrow)
        for _ in range(10):
            prompt = torch.randint(2, (int(torch.randint(1, 30, (), generator=generator)),), generator=generator)
            shadow.request(prompt.tolist(), max_tokens=10)
        shadow.run()
