"""`LLM.save` and `LLM.restore`: a restored conversation goes on as if it had never been away, and is not prefilled."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo import LLM, OctavoError, SamplingParams
from octavo.cache import session
from octavo.cache.session import SavedSession
from octavo.models.model import Model
from octavo.quant.calibration import SYNTHETIC, Calibration

LENGTH = SamplingParams(max_tokens=6, ignore_eos=True)


def new(model: Model, kv: str, calibration: Calibration | None = None, **options: object) -> LLM:
    """An LLM that has seen nothing."""
    settings = {"session_len": 512, "max_batch_size": 2} | options
    return LLM(model, kv, calibration=calibration if kv == "int8" else None, **settings)


def codes(llm: LLM, tokens: list[int]) -> session.Codes:
    return session.to_rows(llm.cache, session.copy_prefix(llm.cache, llm.engine.pool, tokens))


def assert_idle(llm: LLM) -> None:
    llm.engine.scheduler.check()
    assert not llm.engine.busy
    assert not llm.engine.pool.groups[0].used


@pytest.fixture(scope="module")
def prompt(text_ids: list[int]) -> list[int]:
    return text_ids[:140]  # two blocks and a part


@pytest.mark.parametrize("attention", ["reference", "native"])
@pytest.mark.parametrize("kv", ["int8", "int4-token/fp32"])
def test_a_restored_conversation_goes_on_as_the_one_that_stayed(
    kv: str, attention: str, pamphlet: Model, calibration: Calibration, prompt: list[int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Saved under one layout, restored under the other as well."""
    monkeypatch.delenv("OCTAVO_ATTENTION", raising=False)
    calibrated = calibration if kv == "int8" else None
    stayed = LLM(pamphlet, kv, calibration=calibrated, session_len=512, max_batch_size=2)
    answer = stayed.generate(prompt, LENGTH)[0]
    said = prompt + answer.token_ids
    assert stayed.save(tmp_path / "s", said) == 128
    expected = stayed.generate(said, LENGTH)[0]
    assert expected.cached_tokens == 128

    if attention == "reference":
        monkeypatch.setenv("OCTAVO_ATTENTION", "reference")
    back = LLM(pamphlet, kv, calibration=calibrated, session_len=512, max_batch_size=2)
    restored = back.restore(tmp_path / "s")
    assert (restored.tokens, restored.cached_tokens) == (said, 128)
    ours, theirs = codes(back, said), codes(stayed, said)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = back.generate(said, LENGTH)[0]
    assert again.cached_tokens == 128
    if back.cache.layout == stayed.cache.layout:  # the other kernel may round the last bit otherwise
        assert again.token_ids == expected.token_ids
    else:
        assert again.token_ids[0] == expected.token_ids[0]
    assert_idle(back)


def test_what_was_evicted_or_never_computed_is_computed_for_the_file(
    pamphlet: Model, prompt: list[int], tmp_path: Path
) -> None:
    cold = new(pamphlet, "int8-token")
    assert cold.save(tmp_path / "cold", prompt) == 128
    warm = new(pamphlet, "int8-token")
    warm.generate(prompt, LENGTH)
    saved = codes(warm, prompt)
    [blocks] = warm.engine.pool.groups
    for _ in range(len(blocks) - 2):  # all but the first blocks of the prefix are reused
        blocks.release([blocks.take()])
    warm.save(tmp_path / "warm", prompt)
    assert len(warm.engine.pool.find(prompt)) == 2
    for name in ("cold", "warm"):
        found = SavedSession.open(tmp_path / name).codes(warm.cache)
        assert all(torch.equal(found[key], saved[key]) for key in saved)


def test_text_and_messages_are_saved_as_they_will_be_asked(pamphlet: Model, tmp_path: Path) -> None:
    llm = new(pamphlet, "int8-token")
    told = {"role": "user", "content": "Tell me a story about a cat."}
    answer = llm.chat([told], SamplingParams(max_tokens=80, ignore_eos=True))
    messages = [told, {"role": "assistant", "content": answer.text}]
    kept = llm.save(tmp_path / "s", messages, about={"title": "A cat"})
    back = new(pamphlet, "int8-token")
    assert back.restore(tmp_path / "s").cached_tokens == kept > 0
    assert SavedSession.open(tmp_path / "s").about == {"title": "A cat"}
    assert back.chat([*messages, {"role": "user", "content": "And then?"}], LENGTH).cached_tokens == kept

    llm.save(tmp_path / "text", "Once upon a time")
    assert back.restore(tmp_path / "text").tokens == llm.tokenizer("Once upon a time")["input_ids"]


def test_a_session_as_long_as_the_context_is_kept(pamphlet: Model, prompt: list[int], tmp_path: Path) -> None:
    for length in (64, 65):
        llm = new(pamphlet, "int8-token", session_len=length)
        full = prompt[:30] + llm.generate(prompt[:30], replace(LENGTH, max_tokens=1000))[0].token_ids
        assert len(full) == length
        kept = (length - 1) // 64 * 64
        assert llm.save(tmp_path / "s", full) == kept
        llm.engine.pool.clear()
        assert llm.save(tmp_path / "s", full) == kept
        assert_idle(llm)


def test_codes_of_another_format_calibration_model_or_dtype_are_refused(
    pamphlet: Model, calibration: Calibration, prompt: list[int], tmp_path: Path
) -> None:
    new(pamphlet, "int8", calibration).save(tmp_path / "s", prompt)
    wider = LLM(pamphlet, "int8", calibration=calibration, headroom=2.0, session_len=512)
    by_head = LLM(pamphlet, "int8", calibration=calibration, granularity="head", session_len=512)
    other = replace(pamphlet)
    other.fingerprint = "sha128:other"
    other_weights = LLM(other, "int8-token", session_len=512)
    other_weights.cache.plans = new(pamphlet, "int8", calibration).cache.plans
    for llm, reason in [
        (new(pamphlet, "int8-token"), "holds int8 codes, and this cache int8-token"),
        (wider, "another calibration, granularity or headroom"),
        (by_head, "another calibration, granularity or headroom"),
        (other_weights, "saved with other weights"),
        (LLM(Model.load(device="cpu", dtype="bf16"), "int8-token", session_len=512), "holds int8 codes"),
    ]:
        with pytest.raises(OctavoError, match=reason):
            llm.restore(tmp_path / "s")
        assert codes(llm, prompt)["layers.0.k.codes"].shape[1] == 0
    new(pamphlet, "int8-token").save(tmp_path / "s", prompt)
    with pytest.raises(OctavoError, match=r"computed with float32, .* runs with bfloat16"):
        LLM(Model.load(device="cpu", dtype="bf16"), "int8-token", session_len=512).restore(tmp_path / "s")


def test_incomplete_codes_are_computed_again_from_the_tokens_and_said_so(
    pamphlet: Model, prompt: list[int], tmp_path: Path
) -> None:
    llm = new(pamphlet, "int8-token")
    llm.save(tmp_path / "s", prompt)
    expected = codes(llm, prompt)
    whole = (tmp_path / "s").read_bytes()
    flipped = bytearray(whole)
    flipped[-1000] ^= 4
    for data, reason in ((whole[:-1000], "incomplete"), (bytes(flipped), "corrupted")):
        (tmp_path / "s").write_bytes(data)
        back = new(pamphlet, "int8-token")
        with pytest.warns(UserWarning, match=f"{reason}.*computed again"):
            assert back.restore(tmp_path / "s").cached_tokens == 128
        found = codes(back, prompt)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert_idle(back)
    (tmp_path / "s").write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*runs without a calibration")
        new(pamphlet, "int8-token").restore(tmp_path / "s")


def test_sessions_that_could_not_be_recognized_are_not_kept(pamphlet: Model, prompt: list[int], tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="prefix cache, and it is turned off"):
        new(pamphlet, "int8-token", prefix_caching=False).save(tmp_path / "s", prompt)
    random = replace(pamphlet, synthetic=True)
    assert random.fingerprint == SYNTHETIC
    with pytest.raises(OctavoError, match="random weights"):
        new(random, "int8-token").save(tmp_path / "s", prompt)
    with pytest.raises(OctavoError, match="not in the model's vocabulary"):
        new(pamphlet, "int8-token").save(tmp_path / "s", [1, 2, 99999])
    with pytest.raises(OctavoError, match="No such file"):
        new(pamphlet, "int8-token").restore(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
