"""Several threads on one LLM, several LLMs on one model, steps that fail, and Ctrl-C anywhere."""

from __future__ import annotations

import copy
import gc
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

from octavo import LLM, OctavoError, SamplingParams
from octavo.engine.threads import EngineFailed
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from tests.conftest import slow

FORMATS = ("fp32", "int8", "int8-token")
ROOM = {"session_len": 256, "max_batch_size": 8}
STORIES = [
    "Once upon a time, there was a",
    "The cat",
    "One day, Tom and his",
    "A big dog",
    "Lily went to the park with",
]
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=6, temperature=0.9, top_p=0.9, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(pamphlet: Model) -> LLM:
    return LLM(pamphlet, kv="fp32", **ROOM)


def assert_idle(llm: LLM) -> None:
    llm.engine.scheduler.check()
    assert not llm.engine.busy
    assert not llm.engine.pool.groups[0].used
    assert llm.begun == []


def calls(llm: LLM, i: int) -> object:
    """The i-th of a thread's calls: a batch, a conversation, a stream, or a stream given up."""
    story = STORIES[i % len(STORIES)]
    if i % 4 == 0:
        return [completion.token_ids for completion in llm.generate([story, STORIES[i % 3]], [GREEDY, DRAWN])]
    if i % 4 == 1:
        return llm.chat([{"role": "user", "content": story}], GREEDY).text
    stream = llm.generate([story, "The end"], GREEDY, stream=True)
    if i % 4 == 2:
        pieces = list(stream)
        return ["".join(piece.text for piece in pieces if piece.index == at) for at in range(2)]
    given_up = next(stream).text
    if i % 8 == 3:
        stream.close()
    del stream
    return given_up != ""


def together(llms: list[LLM], repetitions: int, threads: int = 4, each: int = 25) -> None:
    """Every thread's answers are those of one thread, on an LLM that is idle before and after."""
    alone = [calls(llms[0], i) for i in range(each)]
    for _ in range(repetitions):
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda n: [calls(llms[n % len(llms)], i) for i in range(each)], range(threads)))
        assert found == [alone] * threads
        for llm in llms:
            assert_idle(llm)


def one_llm(pamphlet: Model, kv: str, calibration: Calibration | None) -> list[LLM]:
    return [LLM(pamphlet, kv=kv, calibration=calibration, **ROOM)]


def two_llms_over_one_model(pamphlet: Model, kv: str, calibration: Calibration | None) -> list[LLM]:
    return [LLM(pamphlet, kv=kv, calibration=calibration, **ROOM) for _ in range(2)]


def two_models(pamphlet: Model, kv: str, calibration: Calibration | None) -> list[LLM]:
    other = Model.load(device="cpu", dtype="float32")
    return [LLM(model, kv=kv, calibration=calibration, **ROOM) for model in (pamphlet, other)]


Make = Callable[[Model, str, Calibration | None], list[LLM]]
MAKES = [one_llm, two_llms_over_one_model, two_models]


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("make", MAKES)
def test_threads_get_the_answers_of_one_thread(pamphlet: Model, calibration: Calibration, make: Make, kv: str):
    llms = make(pamphlet, kv, calibration if kv == "int8" else None)
    together(llms, repetitions=1, each=4)


@pytest.mark.parametrize(("make", "kv"), slow(*product(MAKES, FORMATS)))
def test_threads_get_the_answers_of_one_thread_twenty_times(
    pamphlet: Model, calibration: Calibration, make: Make, kv: str, slowly: Callable[[int], int]
):
    together(make(pamphlet, kv, calibration if kv == "int8" else None), repetitions=slowly(20))


def test_calls_of_several_threads_share_the_batch(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    run = llm.engine.runner.run
    monkeypatch.setattr(llm.engine.runner, "run", lambda batch: (rows.append(len(batch.q_lens)), run(batch))[1])
    begin = threading.Barrier(4)

    def ask(story: str) -> int:
        begin.wait()
        return len(llm.generate(story, SamplingParams(max_tokens=30, ignore_eos=True))[0].token_ids)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, STORIES[:4])) == [30] * 4
    assert max(rows) == 4
    assert len(rows) < 4 * 30


def test_a_stream_that_nobody_reads_does_not_hold_up_the_others(llm: LLM):
    stream = llm.generate("The cat", SamplingParams(max_tokens=100, ignore_eos=True), stream=True)
    next(stream)
    with ThreadPoolExecutor(2) as pool:
        assert all(len(done[0].token_ids) == 8 for done in pool.map(lambda s: llm.generate(s, GREEDY), STORIES))
    del stream
    assert_idle(llm)


def test_a_stream_abandoned_while_another_thread_steps_frees_its_blocks(llm: LLM):
    for _ in range(3):
        stream = llm.generate("The cat", SamplingParams(max_tokens=200, ignore_eos=True), stream=True)
        next(stream)
        other = threading.Thread(target=llm.generate, args=("A big dog", SamplingParams(max_tokens=20)))
        other.start()
        del stream
        gc.collect()
        other.join()
        assert_idle(llm)


def test_a_request_that_cannot_fit_leaves_none_of_its_prompts_behind_while_others_run(llm: LLM):
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(llm.generate, "The cat", SamplingParams(max_tokens=100, ignore_eos=True))
        for _ in range(10):
            with pytest.raises(OctavoError, match="session holds 256"):
                llm.generate(["A big dog", [5] * 256], GREEDY)
        assert len(running.result()[0].token_ids) == 100
    assert_idle(llm)


def test_a_session_is_saved_and_restored_while_other_threads_generate(llm: LLM, tmp_path):
    prompt = [7, 8, 9, 10] * 40
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(lambda: [llm.generate("The cat", GREEDY)[0].token_ids for _ in range(10)])
        assert llm.save(tmp_path / "kept", prompt) == 128
        llm.call(llm.engine.pool.clear)
        assert llm.restore(tmp_path / "kept").cached_tokens == 128
        assert len(set(map(tuple, running.result()))) == 1
    assert llm.generate([prompt], GREEDY)[0].cached_tokens == 128
    assert_idle(llm)


def test_a_model_that_another_thread_loads_changes_no_answer(llm: LLM):
    """Loading sets torch's default type for the whole process; here it stays so for the whole of an answer."""
    params = [
        SamplingParams(max_tokens=8, temperature=0.9, top_k=3000, top_p=0.9, logit_bias={7: 0.3}, seed=1, logprobs=3)
    ]
    prompts = [STORIES[0] * 12]
    whole = llm.generate(prompts, params)[0].sampled
    for dtype in (torch.bfloat16, torch.float64):
        llm.engine.pool.clear()
        torch.set_default_dtype(dtype)
        try:
            assert llm.generate(prompts, params)[0].sampled == whole
        finally:
            torch.set_default_dtype(torch.float32)


# --- failures --------------------------------------------------------------------------------------------------------


def test_after_a_step_failed_every_waiting_and_every_later_call_names_the_first_cause(pamphlet: Model):
    broken = LLM(pamphlet, kv="fp32", **ROOM)
    begin, whole = threading.Barrier(4), broken.engine.runner.run
    causes = iter(["out of memory", "something else"])

    def fail(batch):
        if len(batch.q_lens) < 4 or len(batch.ids) > 4:
            return whole(batch)
        raise RuntimeError(next(causes))

    broken.engine.runner.run = fail

    def ask(story: str) -> str:
        begin.wait()
        with pytest.raises(EngineFailed) as error:
            broken.generate(story, SamplingParams(max_tokens=200, ignore_eos=True))
        return str(error.value)

    with ThreadPoolExecutor(4) as pool:
        said = set(pool.map(ask, STORIES[:4]))
    for later in (lambda: broken.generate("The cat"), lambda: broken.chat([{"role": "user", "content": "Hi"}])):
        with pytest.raises(EngineFailed) as error:
            later()
        said.add(str(error.value))
        assert str(error.value.__cause__) == "out of memory"
    assert len(said) == 1
    assert "RuntimeError: out of memory" in said.pop()
    assert_idle(broken)


def test_an_llm_says_instead_of_being_pickled_or_copied_what_to_do(llm: LLM):
    for make in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(OctavoError, match=r"make one in each process with LLM\(") as error:
            make(llm)
        assert "\n" not in str(error.value)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, as in a program; a worker of pytest-xdist ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.fixture
def interrupted_after(ctrl_c: None):  # noqa: ARG001
    """Calls a function and sends this process Ctrl-C after so many seconds; whether it came within the call."""

    def run(seconds: float, function: Callable[[], object]) -> bool:
        timer = threading.Timer(seconds, signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            function()
            timer.join()
        except KeyboardInterrupt:
            return True
        finally:
            timer.join()
        return False

    return run


def test_ctrl_c_anywhere_in_generate_frees_every_block_and_the_next_call_answers(llm: LLM, interrupted_after):
    whole = llm.generate(STORIES, GREEDY)
    long = SamplingParams(max_tokens=200, ignore_eos=True)
    came = 0
    for i in range(30):
        came += interrupted_after(0.005 + 0.0007 * i, lambda: llm.generate(STORIES, long))
        assert_idle(llm)
    assert came == 30
    assert [a.token_ids for a in llm.generate(STORIES, GREEDY)] == [a.token_ids for a in whole]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_within_the_tables_of_a_step_waits_until_they_are_whole(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def interrupt(function: Callable) -> Callable:
        def inner(*args):
            signal.raise_signal(signal.SIGINT)
            seen.append(function.__name__)
            return function(*args)

        return inner

    for name in ("take", "release", "seal"):
        llm.engine.pool.clear()
        seen.clear()
        with monkeypatch.context() as patch:
            [blocks] = llm.engine.pool.groups
            patch.setattr(blocks, name, interrupt(getattr(blocks, name)))
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[5] * 100, [6] * 70], SamplingParams(max_tokens=30, ignore_eos=True))
        assert set(seen) == {name}
        assert_idle(llm)
    assert len(llm.generate("The cat", GREEDY)[0].token_ids) == 8, "an interrupt was kept for the next call"


def test_ctrl_c_ends_the_main_threads_calls_and_no_others(llm: LLM, interrupted_after):
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    whole = [llm.generate(story, long)[0].token_ids for story in STORIES]
    with ThreadPoolExecutor(4) as pool:
        others = pool.map(lambda story: llm.generate(story, long)[0].token_ids, STORIES)
        interrupted_after(0.05, lambda: llm.generate("Hello", SamplingParams(max_tokens=240, ignore_eos=True)))
        assert list(others) == whole
    assert_idle(llm)
