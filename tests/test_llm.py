"""The Python face: every way to ask, every way an answer ends, and what is refused."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import psutil
import pytest

from octavo import LLM, KVFormat, OctavoError, SamplingParams
from octavo.completion import Completion, Delta
from octavo.models.model import BUNDLED, Model
from octavo.quant.calibration import Calibration
from tests.conftest import overflowing

STORY = "Once upon a time, there was a"
SHORT = SamplingParams(max_tokens=12)
ROOM = {"session_len": 512, "max_batch_size": 4}


@pytest.fixture(scope="module")
def llm(pamphlet: Model) -> LLM:
    return LLM(pamphlet, kv="fp32", **ROOM)


@pytest.fixture(autouse=True)
def _whole(llm: LLM):
    """Whatever a test did, no block is held when it is done."""
    llm.engine.pool.clear()
    yield
    assert_idle(llm)


@pytest.fixture(scope="module")
def story(llm: LLM) -> Completion:
    """A long greedy answer that no EOS ends."""
    return llm.generate(STORY, SamplingParams(max_tokens=40, ignore_eos=True))[0]


def assert_idle(llm: LLM) -> None:
    llm.engine.scheduler.check()
    assert not llm.engine.busy
    assert not llm.engine.pool.groups[0].used
    assert llm.begun == []


def with_eos(llm: LLM, *ids: int) -> LLM:
    """The same model, as if these tokens ended its answers."""
    return LLM(replace(llm.model, eos_ids=frozenset(ids)), kv="fp32", **ROOM)


# --- ways to ask -----------------------------------------------------------------------------------------------------


def test_a_string_a_list_of_one_and_its_token_ids_are_the_same_prompt(llm: LLM):
    ids = llm.tokenizer(STORY)["input_ids"]
    answers = [llm.generate(prompt, SHORT) for prompt in (STORY, [STORY], ids, [ids], tuple(ids))]
    assert all(len(completions) == 1 for completions in answers)
    assert len({completions[0].text for completions in answers}) == 1
    assert answers[0][0].prompt_tokens == len(ids)
    assert answers[0][0].text == llm.tokenizer.decode(answers[0][0].token_ids)


def test_completions_come_in_the_order_of_their_prompts_not_of_their_ends(llm: LLM):
    prompts = ["The cat", llm.tokenizer("A big dog")["input_ids"], STORY, "One day", "Tom and"]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (20, 3, 11, 1, 7)]
    together = llm.generate(prompts, params)
    assert [len(completion.token_ids) for completion in together] == [20, 3, 11, 1, 7]
    for prompt, own, completion in zip(prompts, params, together, strict=True):
        assert llm.generate([prompt], own)[0].token_ids == completion.token_ids


def test_each_prompt_may_have_parameters_of_its_own_and_their_number_must_agree(llm: LLM):
    free = SamplingParams(max_tokens=6, temperature=5.0, seed=1, ignore_eos=True)
    greedy, drawn = llm.generate([STORY, STORY], [replace(SHORT, ignore_eos=True), free])
    assert (len(greedy.token_ids), len(drawn.token_ids)) == (12, 6)
    assert drawn.token_ids != greedy.token_ids[:6]
    with pytest.raises(OctavoError, match="2 prompts but 1 sampling parameters"):
        llm.generate([STORY, STORY], [SHORT])


def test_no_prompts_give_no_completions(llm: LLM):
    assert llm.generate([], SHORT) == []


def test_a_stream_is_the_completions_in_pieces(llm: LLM):
    prompts = [STORY, "The cat", "One day the"]
    params = [SamplingParams(max_tokens=n, logprobs=1, ignore_eos=True) for n in (9, 20, 1)]
    whole = llm.generate(prompts, params)
    llm.engine.pool.clear()
    deltas = list(llm.generate(prompts, params, stream=True))
    assert all(isinstance(delta, Delta) for delta in deltas)
    for i, expected in enumerate(whole):
        pieces = [delta for delta in deltas if delta.index == i]
        assert "".join(piece.text for piece in pieces) == expected.text
        assert [piece.completion for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        got = pieces[-1].completion
        assert (got.text, got.token_ids, got.finish_reason) == (
            expected.text,
            expected.token_ids,
            expected.finish_reason,
        )
    assert {delta.index for delta in deltas[:6]} == {0, 1, 2}, "one answer after the other, not together"


def test_a_stream_gives_its_first_piece_long_before_the_last(llm: LLM):
    stream = llm.generate(STORY, SamplingParams(max_tokens=100, ignore_eos=True), stream=True)
    next(stream)
    assert len(llm.engine.scheduler.running[0].output) <= 2
    stream.close()


def test_chat_answers_the_template_and_streams_the_same(llm: LLM):
    messages = [{"role": "user", "content": "Tell me a story about a dog."}]
    answer = llm.chat(messages, SHORT)
    template = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert template.endswith("<|assistant|>")
    assert answer.token_ids == llm.generate(template, SHORT)[0].token_ids
    *_, last = llm.chat(messages, SHORT, stream=True)
    assert last.completion.text == answer.text
    assert "<|" not in answer.text


def test_chat_answers_each_of_a_list_of_conversations_and_reads_parts_of_text(llm: LLM):
    first, second = ([{"role": "user", "content": text}] for text in ("Tell me a story.", "Hello!"))
    both = llm.chat([first, second], [SHORT, replace(SHORT, max_tokens=5)])
    assert [answer.token_ids for answer in both] == [
        llm.chat(first, SHORT).token_ids, llm.chat(second, SHORT).token_ids[:5]
    ]  # fmt: skip
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]}]
    assert llm.chat(parts, SHORT).text == llm.chat(second, SHORT).text


def test_prompts_in_vllms_forms_are_the_same_prompt(llm: LLM):
    ids = llm.tokenizer(STORY)["input_ids"]
    answers = llm.generate([STORY, {"prompt": STORY}, {"prompt_token_ids": ids}], sampling_params=SHORT)
    assert len({answer.text for answer in answers}) == 1


def test_log_probabilities_come_with_the_tokens_where_asked_for(llm: LLM):
    asked, plain = llm.generate([STORY, "The cat"], [replace(SHORT, logprobs=2), SHORT])
    assert [s.token for s in asked.sampled] == asked.token_ids
    assert all(len(s.top) == 2 and s.logprob is not None for s in asked.sampled)
    assert all(s.logprob is None and s.top == {} for s in plain.sampled)


# --- ways to end -----------------------------------------------------------------------------------------------------


def test_an_answer_of_the_greatest_length_says_so(llm: LLM):
    completion = llm.generate(STORY, SamplingParams(max_tokens=7, ignore_eos=True))[0]
    assert (len(completion.token_ids), completion.finish_reason) == (7, "length")


def test_an_answer_ends_where_the_session_does(pamphlet: Model):
    small = LLM(pamphlet, kv="fp32", session_len=20)
    completion = small.generate(STORY, SamplingParams(ignore_eos=True))[0]
    assert completion.prompt_tokens + len(completion.token_ids) == 20
    assert completion.finish_reason == "length"
    with pytest.raises(OctavoError, match=r"prompt has 20 tokens .*session holds 20 .*--session-len"):
        small.generate([5] * 20)


def test_a_prompt_too_long_for_the_cache_names_the_cache(pamphlet: Model):
    small = LLM(pamphlet, kv="fp32", kv_cache_memory="1MiB")
    assert small.session_len == 2048
    with pytest.raises(OctavoError, match=r"prompt has 500 tokens .*KV cache holds \d+ .*--kv-cache-memory"):
        small.generate([5] * 500)
    assert_idle(small)


@pytest.mark.parametrize("which", [0, 1])
def test_any_of_several_eos_ids_ends_an_answer_and_is_a_token_of_it_but_not_text(
    llm: LLM, story: Completion, which: int
):
    at = (9, 4)[which]
    ids = [story.token_ids[at], next(t for t in range(4000) if t not in story.token_ids)][:: -1 if which else 1]
    at = story.token_ids.index(story.token_ids[at])
    completion = with_eos(llm, *ids).generate(STORY, SamplingParams(max_tokens=40))[0]
    assert completion.finish_reason == "stop"
    assert completion.token_ids == story.token_ids[: at + 1]
    assert completion.text == llm.tokenizer.decode(story.token_ids[:at])


def test_the_first_of_two_eos_ids_that_comes_ends_the_answer(llm: LLM, story: Completion):
    ended = with_eos(llm, story.token_ids[12], story.token_ids[5])
    completion = ended.generate(STORY, SamplingParams(max_tokens=40))[0]
    assert len(completion.token_ids) == 1 + min(story.token_ids.index(story.token_ids[i]) for i in (12, 5))


def test_ignore_eos_goes_on_to_the_greatest_length(llm: LLM, story: Completion):
    ended = with_eos(llm, story.token_ids[4])
    completion = ended.generate(STORY, SamplingParams(max_tokens=40, ignore_eos=True))[0]
    assert completion.token_ids == story.token_ids
    assert completion.finish_reason == "length"


def test_the_bundled_models_own_eos_ids_are_all_of_its_generation_config(pamphlet: Model):
    assert pamphlet.eos_ids == {0, 3}


def test_a_requests_own_stop_ids_end_it_even_if_eos_is_ignored(llm: LLM, story: Completion):
    token = story.token_ids[6]
    params = SamplingParams(max_tokens=40, stop_token_ids=(token, 4095), ignore_eos=True)
    completion = llm.generate(STORY, params)[0]
    assert completion.token_ids == story.token_ids[: story.token_ids.index(token) + 1]
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(llm: LLM, story: Completion, stream: bool):
    at = len(story.text) // 2
    stop = story.text[at : at + 7]
    assert len(llm.tokenizer(stop)["input_ids"]) > 1, "it must span tokens"
    params = SamplingParams(max_tokens=40, stop=("never to be seen", stop), ignore_eos=True)
    if stream:
        deltas = list(llm.generate(STORY, params, stream=True))
        completion = deltas[-1].completion
        assert "".join(delta.text for delta in deltas) == completion.text
    else:
        completion = llm.generate(STORY, params)[0]
    assert completion.text == story.text[: story.text.index(stop)]
    assert completion.finish_reason == "stop"
    assert completion.token_ids == story.token_ids[: len(completion.token_ids)]
    assert len(completion.token_ids) < 40, "computed on after its end"


def test_a_stop_string_completed_by_the_last_allowed_token_is_a_stop(llm: LLM, story: Completion):
    n = 10
    before, after = (llm.tokenizer.decode(story.token_ids[:k]) for k in (n - 1, n))
    stop = after[len(before) - 2 :]
    assert stop not in before
    completion = llm.generate(STORY, SamplingParams(max_tokens=n, stop=stop, ignore_eos=True))[0]
    assert (completion.finish_reason, completion.text) == ("stop", before[:-2])


def test_what_a_stop_string_held_back_is_part_of_an_answer_that_ends_without_it(llm: LLM, story: Completion):
    text = llm.tokenizer.decode(story.token_ids[:10])
    params = SamplingParams(max_tokens=10, stop=text[-3:] + "\x00", ignore_eos=True)
    completion = llm.generate(STORY, params)[0]
    assert (completion.text, completion.finish_reason) == (text, "length")


def test_no_answer_ends_before_min_tokens_by_a_token_or_a_stop_string(llm: LLM, story: Completion):
    ended = with_eos(llm, story.token_ids[4])
    early = ended.generate(STORY, SamplingParams(max_tokens=40))[0]
    late = ended.generate(STORY, SamplingParams(max_tokens=40, min_tokens=20, stop_token_ids=(story.token_ids[8],)))[0]
    assert len(early.token_ids) <= 5
    assert len(late.token_ids) >= 20
    assert not {story.token_ids[4], story.token_ids[8]} & set(late.token_ids[:20])
    text = llm.generate(STORY, SamplingParams(max_tokens=40, min_tokens=30, stop=" ", ignore_eos=True))[0]
    assert 30 < len(text.token_ids) < 40
    assert text.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_what_ended_an_answer_is_in_its_text_if_asked_for(llm: LLM, story: Completion, stream: bool):
    def text(ended: LLM, **params: object) -> str:
        if stream:
            return "".join(delta.text for delta in ended.generate(STORY, SamplingParams(**params), stream=True))
        return ended.generate(STORY, SamplingParams(**params))[0].text

    stop, keep = story.text[20:27], {"max_tokens": 40, "include_stop_str_in_output": True}
    assert text(llm, **keep, stop=stop, ignore_eos=True) == story.text[: story.text.index(stop) + 7]
    at = story.token_ids.index(story.token_ids[6]) + 1
    by_token = text(llm, **keep, stop_token_ids=[story.token_ids[6]], ignore_eos=True)
    assert by_token == llm.tokenizer.decode(story.token_ids[:at])


def test_the_models_own_end_is_a_stop_string_too_and_text_where_special_tokens_are_shown(llm: LLM):
    messages = [{"role": "user", "content": "Tell me a story about a dog."}]
    plain = llm.chat(messages, SamplingParams(max_tokens=450))
    assert plain.finish_reason == "stop"
    for stop in ("<|end|>", plain.text[-3:] + "<|end|>"):
        ignored = llm.chat(messages, SamplingParams(max_tokens=450, stop=stop, ignore_eos=True))
        assert ignored.finish_reason == "stop"
        assert ignored.text == plain.text.removesuffix(stop.removesuffix("<|end|>"))
        assert ignored.token_ids == plain.token_ids
    shown = llm.chat(
        messages, SamplingParams(max_tokens=450, skip_special_tokens=False, include_stop_str_in_output=True)
    )
    assert shown.text == plain.text + "<|end|>"


# --- answers that fail -----------------------------------------------------------------------------------------------


def test_an_answer_whose_logits_overflow_ends_with_the_reason_and_the_others_go_on(llm: LLM, story: Completion):
    poison = 1234
    assert poison not in story.token_ids
    params = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=1)
    with overflowing(llm.model, poison):
        bad, good, drawn = llm.generate(
            [[5, poison, 7], STORY, [poison]], [params, params, replace(params, temperature=1.0, top_p=0.9)]
        )
    for one in (bad, drawn):
        assert (one.finish_reason, one.text, one.token_ids) == ("error", "", [])
        assert "overflow" in one.error
        assert "--dtype" in one.error
    assert (good.token_ids, good.error) == (story.token_ids, None)
    assert all(math.isfinite(p) for one in good.sampled for p in (one.logprob, *one.top.values()))
    again = llm.generate(["A dog", STORY], params)  # in the blocks that held NaN
    assert again[1].token_ids == story.token_ids


# --- streams that end early ------------------------------------------------------------------------------------------


def test_an_abandoned_stream_frees_its_blocks_and_leaves_others_alone(llm: LLM, story: Completion):
    long = SamplingParams(max_tokens=40, ignore_eos=True)
    kept = llm.generate(STORY, long, stream=True)
    dropped = llm.generate(["The cat", "One day"], long, stream=True)
    texts = [next(kept).text]
    for _ in range(5):
        next(dropped)
    assert len(llm.engine.scheduler.running) == 3
    dropped.close()
    llm.engine.scheduler.check()
    assert len(llm.engine.scheduler.running) == 1
    texts += [delta.text for delta in kept]
    assert "".join(texts) == story.text


def test_a_stream_that_is_only_forgotten_frees_its_blocks_too(llm: LLM):
    stream = llm.generate(STORY, SamplingParams(max_tokens=100), stream=True)
    next(stream)
    assert llm.engine.busy
    del stream
    assert_idle(llm)


def test_a_stream_never_started_takes_nothing(llm: LLM):
    stream = llm.generate(STORY, SHORT, stream=True)
    assert_idle(llm)
    stream.close()


def test_two_streams_read_in_turns_give_what_each_gives_alone(llm: LLM):
    params = SamplingParams(max_tokens=15, ignore_eos=True)
    alone = [llm.generate(prompt, params)[0].text for prompt in (STORY, "The cat")]
    streams = [llm.generate(prompt, params, stream=True) for prompt in (STORY, "The cat")]
    texts = ["", ""]
    for both in zip_longest(*streams):
        for i, delta in enumerate(both):
            texts[i] += delta.text if delta else ""
    assert texts == alone


def test_an_interrupt_within_a_step_ends_the_answer_and_not_the_llm(
    llm: LLM, story: Completion, monkeypatch: pytest.MonkeyPatch
):
    stream = llm.generate(STORY, SamplingParams(max_tokens=40), stream=True)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert_idle(llm)
    assert llm.generate(STORY, SamplingParams(max_tokens=40, ignore_eos=True))[0].token_ids == story.token_ids


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 4096, 10**9])
def test_a_token_that_the_model_does_not_have_is_refused_by_its_number(llm: LLM, token: int):
    with pytest.raises(OctavoError, match=f"token {token} .*4096"):
        llm.generate([[1, 2, token]], SHORT)
    with pytest.raises(OctavoError, match=f"token {token} .*4096|stop_token_ids is"):
        llm.generate(STORY, SamplingParams(stop_token_ids=(token,)))


@pytest.mark.parametrize("prompt", ["", [[]]])
def test_an_empty_prompt_is_refused(llm: LLM, prompt: str | list):
    with pytest.raises(OctavoError, match="empty"):
        llm.generate(prompt, SHORT)


def test_one_bad_prompt_among_good_ones_is_refused_before_any_work_and_leaves_nothing_behind(llm: LLM):
    for bad in ("", [5] * 600):
        with pytest.raises(OctavoError):
            llm.generate([STORY, bad, "The cat"], SHORT)
        assert_idle(llm)


def test_int8_without_a_calibration_names_both_remedies(
    pamphlet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    bare = replace(pamphlet, path=tmp_path)  # without whatever lies beside the weights
    with pytest.raises(OctavoError, match=r"int8 needs a calibration.*octavo calibrate pamphlet.*--kv kv8"):
        LLM(bare, kv="int8")
    assert LLM(bare, kv="int8-token").calibration is None


def test_a_calibration_of_other_weights_is_refused(pamphlet: Model, calibration: Calibration):
    other = Calibration(replace(calibration.header, fingerprint="sha256:0000"), calibration.layers)
    with pytest.raises(OctavoError, match=r"other weights.*octavo calibrate"):
        LLM(pamphlet, kv="int8", calibration=other)


@pytest.mark.parametrize("rotary", ["0123abcd", ""])
def test_a_calibration_under_other_rope_settings_or_unknown_ones_is_refused(
    pamphlet: Model, calibration: Calibration, rotary: str
):
    other = Calibration(replace(calibration.header, rotary=rotary), calibration.layers)
    with pytest.raises(OctavoError, match=r"other RoPE settings \((0123abcd|not recorded)\).*octavo calibrate"):
        LLM(pamphlet, kv="int8", calibration=other)


def test_a_calibration_of_another_geometry_is_refused(pamphlet: Model, calibration: Calibration):
    with pytest.raises(OctavoError, match="5 layers"):
        LLM(pamphlet, kv="int8", calibration=Calibration(calibration.header, calibration.layers[:-1]))


def test_an_unknown_format_lists_those_there_are(pamphlet: Model):
    with pytest.raises(OctavoError, match=r"int7.*int8-token"):
        LLM(pamphlet, kv="int7")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("kvv", "LLM has no argument 'kvv'; did you mean kv? choose model, kv, "),
        ("dtpe", "did you mean dtype?"),
        ("plain_weights", "LLM has no argument 'plain_weights'; choose model, "),
    ],
)
def test_an_unknown_argument_is_named_with_those_there_are(wrong: str, says: str):
    with pytest.raises(TypeError, match=re.escape(says)):
        LLM(**{wrong: "kv8"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kv": 8}, "named by text like 'kv8', not by a value of type int"),
        ({"kv": ["kv8"]}, "of type list"),
        ({"cache_max_entry_count": "0.5"}, "between 0 and 1, not '0.5'"),
        ({"kv": "int8", "headroom": "1"}, "a headroom of '1' makes no sense"),
        ({"max_batch_size": None}, "max_batch_size is None"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(
    pamphlet: Model, calibration: Calibration, wrong: dict[str, object], says: str
):
    with pytest.raises(OctavoError, match=re.escape(says)):
        LLM(pamphlet, calibration=calibration, **wrong)  # type: ignore[arg-type]


def test_options_of_loading_for_a_loaded_model_are_refused(pamphlet: Model):
    with pytest.raises(TypeError, match="dtype"):
        LLM(pamphlet, dtype="float32")


# --- the cache -------------------------------------------------------------------------------------------------------


def test_int8_takes_a_calibration_from_memory_a_file_or_a_directory(
    pamphlet: Model, calibration: Calibration, tmp_path: Path
):
    file = calibration.save(tmp_path)
    texts = {LLM(pamphlet, kv="int8", calibration=c, **ROOM).generate(STORY, SHORT)[0].text
             for c in (calibration, file, str(tmp_path))}  # fmt: skip
    assert len(texts) == 1


def test_granularity_and_headroom_override_the_calibrations_own(pamphlet: Model, calibration: Calibration):
    def scale(**how: object) -> object:
        return LLM(pamphlet, kv="int8", calibration=calibration, **how, **ROOM).cache.layers[0].k.static.c

    assert (scale(headroom=3.0) / scale(headroom=1.5)).allclose(scale() * 0 + 2)
    assert scale(granularity="tensor").unique().numel() == 1
    assert scale().unique().numel() > 100


def test_serving_beyond_the_calibrated_positions_warns(pamphlet: Model, calibration: Calibration):
    with pytest.warns(UserWarning, match=r"2048 tokens .*up to 511"):
        LLM(pamphlet, kv="int8", calibration=calibration, max_batch_size=1)


def test_the_format_may_be_a_value_and_is_by_default_the_models_own(pamphlet: Model, llm: LLM):
    assert str(LLM(pamphlet, **ROOM).format) == "fp32"
    mixed = LLM(pamphlet, kv=KVFormat.parse("k8v4"), **ROOM)
    assert str(mixed.format) == "k8v4"
    assert mixed.cache.size.block < llm.cache.size.block / 4


@pytest.mark.parametrize("memory", ["3MiB", "3072 kib", 3 << 20, "3145728B"])
def test_the_cache_takes_the_memory_that_was_asked_for_and_not_a_block_more(pamphlet: Model, memory: str | int):
    cache = LLM(pamphlet, kv="fp32", kv_cache_memory=memory).cache
    assert 3 << 20 >= cache.nbytes > (3 << 20) - cache.size.block
    assert cache.nbytes == sum(store.codes.nbytes for store in cache.stores)


def test_a_cache_takes_memory_as_it_is_written(pamphlet: Model):
    """A short answer from a cache of half a GiB touches a few blocks of it."""
    process = psutil.Process()
    before = process.memory_info().rss
    llm = LLM(pamphlet, kv="kv8", kv_cache_memory="512MiB")
    for _ in range(3):  # what is over is found by the next one or used again
        llm.generate(STORY, SHORT)
    assert llm.cache.nbytes > 500 << 20
    assert process.memory_info().rss - before < 64 << 20


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("4 apples", "4 apples"),
        ("3000", ".3000. has no unit"),
        ("1.2.3GiB", "1.2.3GiB"),
        ("10KiB", "not one block"),
        (-1, "-1 is not an amount"),
        (0.5, "0.5 is not an amount"),
    ],
)
def test_a_senseless_amount_of_memory_is_refused(pamphlet: Model, memory: str, said: str):
    with pytest.raises(OctavoError, match=said):
        LLM(pamphlet, kv="fp32", kv_cache_memory=memory)


@pytest.mark.parametrize("name", ["session_len", "max_batch_size", "max_batch_tokens"])
@pytest.mark.parametrize("size", [0, -5, "512", 2.5, True])
def test_a_size_that_is_no_number_above_zero_is_refused_by_its_name(pamphlet: Model, name: str, size: object):
    with pytest.raises(OctavoError, match=f"{name} is {size!r}; it must be a whole number"):
        LLM(pamphlet, kv="fp32", **{name: size})


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_senseless_share_of_the_free_memory_is_refused(pamphlet: Model, share: float):
    with pytest.raises(OctavoError, match="cache-max-entry-count"):
        LLM(pamphlet, kv="fp32", cache_max_entry_count=share)


def test_by_default_a_cpu_cache_is_what_its_sessions_need(pamphlet: Model):
    cache = LLM(pamphlet, kv="fp32", session_len=200, max_batch_size=3).cache
    assert cache.num_blocks == 3 * 4  # of 64 tokens


def test_int4_holds_nearly_eight_times_the_tokens_of_fp32_in_the_same_memory(pamphlet: Model):
    full, folded = (LLM(pamphlet, kv=kv, kv_cache_memory="8MiB").cache.num_blocks for kv in ("fp32", "int4-token"))
    assert 7.5 < folded / full < 8


def test_a_second_turn_finds_the_first_and_its_answer_in_the_cache(llm: LLM):
    messages = [{"role": "user", "content": "Tell me a story about a dog and a cat in a big house. " * 6}]
    params = SamplingParams(max_tokens=70, ignore_eos=True)
    first = llm.chat(messages, params)
    assert first.cached_tokens == 0
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    second = llm.chat(messages, SHORT)
    known = first.prompt_tokens + len(first.token_ids) - 1
    assert second.cached_tokens == known // 64 * 64 > first.prompt_tokens
    llm.engine.pool.clear()
    cold = llm.chat(messages, SHORT)
    assert cold.cached_tokens == 0
    assert cold.token_ids == second.token_ids


def test_without_prefix_caching_nothing_is_found(pamphlet: Model):
    forgetful = LLM(pamphlet, kv="fp32", prefix_caching=False, **ROOM)
    prompt = [7] * 200
    assert [forgetful.generate(prompt, SHORT)[0].cached_tokens for _ in range(2)] == [0, 0]


# --- defaults --------------------------------------------------------------------------------------------------------


def defaults(llm: LLM, **asked: object) -> SamplingParams:
    return LLM(replace(llm.model, generation=asked), kv="fp32", **ROOM).default_params


def test_the_bundled_models_defaults_are_those_of_its_generation_config(llm: LLM):
    assert llm.default_params == SamplingParams(max_tokens=256, temperature=0.7, top_p=0.9)


def test_a_generation_config_that_samples_gives_its_parameters(llm: LLM):
    asked = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.1}
    assert defaults(llm, do_sample=True, **asked) == SamplingParams(**asked)
    assert defaults(llm, do_sample=True) == SamplingParams(temperature=1.0)
    assert defaults(llm, do_sample=True, max_new_tokens=9) == SamplingParams(temperature=1.0, max_tokens=9)


def test_a_generation_config_that_does_not_sample_is_greedy_whatever_else_it_names(llm: LLM):
    assert defaults(llm) == SamplingParams()
    assert defaults(llm, temperature=0.6, top_k=20, repetition_penalty=1.2) == SamplingParams(repetition_penalty=1.2)


def test_requests_without_parameters_take_the_models_defaults(llm: LLM):
    short = LLM(replace(llm.model, generation={"max_new_tokens": 5}, eos_ids=frozenset()), kv="fp32", **ROOM)
    assert len(short.generate(STORY)[0].token_ids) == 5
    assert len(short.chat([{"role": "user", "content": "Hi"}]).token_ids) == 5


def test_the_bundled_model_is_what_one_gets_without_naming_any():
    named, unnamed = LLM(session_len=64, max_batch_size=1, device="cpu"), LLM("pamphlet", session_len=64, device="cpu")
    assert named.model.path == unnamed.model.path == BUNDLED
    assert str(named.format) == "bf16"
    assert named.generate(STORY, SHORT)[0].text == unnamed.generate(STORY, SHORT)[0].text != ""
