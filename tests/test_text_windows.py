"""Windows: their length, their start, where they come from, and how little is read for them."""

from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from octavo import text_windows
from octavo.corpus import Texts
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.models.model import Model
from octavo.text_windows import consecutive_windows, opening, self_windows, token_windows

TEMPLATE = "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}<e>{% endfor %}"
BOS, EOS, USER, ANSWER, END = range(5)
PROSE = " ".join(f"w{i}." for i in range(20_000))


def bytes_tokenizer(bos: bool, eos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """A token for each byte."""
    specials = {"<s>": BOS, "</s>": EOS, "<u>": USER, "<a>": ANSWER, "<e>": END}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(specials | {c: 5 + i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    around = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    tokenizer.post_processor = processors.TemplateProcessing(" ".join(around), None, [("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", chat_template=template)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.chars, self.chat_template = tokenizer, 0, None

    def __call__(self, text: str, **options: Any) -> Any:
        self.chars += len(text)
        return self.tokenizer(text, **options)


@pytest.fixture(scope="session")
def pairs(pamphlet: Model) -> Any:
    """A tokenizer that merges, and puts nothing before a text."""
    return pamphlet.tokenizer


def test_opening_is_what_the_tokenizer_puts_before_a_text(pairs: Any) -> None:
    assert opening(pairs) == []
    assert opening(bytes_tokenizer(bos=False)) == []
    assert opening(bytes_tokenizer(bos=True)) == [BOS]
    assert opening(bytes_tokenizer(bos=True, eos=True)) == [BOS]
    assert opening(bytes_tokenizer(bos=False, eos=True)) == []


def test_windows_of_a_running_text(pairs: Any) -> None:
    found = token_windows([PROSE], pairs, 20, 100, chat_share=0)
    assert [len(window) for window in found] == [100] * 20
    places = []
    for window in found:
        text = pairs.decode(window)
        assert text in PROSE
        assert text.startswith("w")  # not within a word
        places.append((PROSE.index(text), len(text)))
    places.sort()
    assert all(at + size <= after for (at, size), (after, _) in pairwise(places))
    assert all(i <= 20 * at / len(PROSE) <= i + 1 for i, (at, _) in enumerate(places)), "not spread over the text"


def test_windows_are_reproducible(pairs: Any) -> None:
    first = token_windows([PROSE], pairs, 8, 50, seed=1)
    assert token_windows(iter([PROSE]), pairs, 8, 50, seed=1) == first
    assert token_windows([PROSE], pairs, 8, 50, seed=2) != first


@pytest.mark.parametrize("eos", [False, True])
def test_windows_start_as_the_tokenizer_starts_a_text(eos: bool) -> None:
    tokenizer = bytes_tokenizer(bos=True, eos=eos)
    for window in token_windows([PROSE], tokenizer, 5, 40):
        assert window == tokenizer(tokenizer.decode(window[1:]))["input_ids"][:40]
        assert EOS not in window


def test_documents_are_started_at_their_beginning_and_followed_by_others() -> None:
    tokenizer = bytes_tokenizer(bos=True)
    documents = [f"<{i:03}>" + " word" * 12 for i in range(300)]
    found = token_windows(documents, tokenizer, 40, 250)
    for window in found:
        text = tokenizer.decode(window[1:])
        assert text.startswith("<")
        passages = text.split("\n\n")
        assert len(passages) == 4
        assert all(passage in documents for passage in passages[:-1])
    assert len({tuple(window) for window in found}) == 40


def test_scripts_without_spaces(pairs: Any) -> None:
    text = "".join(chr(0x4E00 + i * 7919 % 20000) for i in range(5000))
    assert {len(window) for window in token_windows([text], pairs, 10, 64)} == {64}


def test_chat_windows() -> None:
    tokenizer = bytes_tokenizer(bos=True, template=TEMPLATE)
    found = token_windows([PROSE], tokenizer, 16, 120)
    chats = [window for window in found if window[0] == USER]
    assert len(chats) == 4
    assert all(window[0] == BOS for window in found if window not in chats)
    for window in chats:
        assert len(window) == 120
        turn = window.index(END)
        assert window[turn + 1] == ANSWER
        user, answer = tokenizer.decode(window[1:turn]), tokenizer.decode(window[turn + 2 :])
        assert f"{user} {answer}" in PROSE  # cut between words
        assert 6 <= len(user) <= 70
    places = sorted(PROSE.index(tokenizer.decode(window[1 : window.index(END)])) for window in chats)
    assert places[-1] > len(PROSE) / 2, "all chats are from one part of the text"
    assert all(window[0] == USER for window in token_windows([PROSE], tokenizer, 4, 50, chat_share=1.0))
    assert not any(USER in window for window in token_windows([PROSE], tokenizer, 4, 50, chat_share=0))


def test_a_template_that_refuses_is_named() -> None:
    tokenizer = bytes_tokenizer(bos=True, template="{{ raise_exception('no assistants') }}")
    with pytest.raises(OctavoError, match=r"refused .*no assistants.*--chat-template"):
        token_windows([PROSE], tokenizer, 4, 50)
    with pytest.raises(OctavoError, match="fills no window of 50 tokens"):
        token_windows(["a " * 500], bytes_tokenizer(bos=True, template="{{ 'x' }}"), 4, 50)


def test_too_little_text() -> None:
    tokenizer = bytes_tokenizer(bos=True)
    text = "abcd " * 198 + "abcdefghi"  # 999
    texts = Texts("ptb (ptb.txt)", lambda: [text + "j"])
    assert len(token_windows(texts, tokenizer, 10, 101)) == 10  # 1000 tokens and ten BOS
    with pytest.raises(
        OctavoError, match=r"the text has 999 tokens, but 10 windows of 100 take 1,000: lower --calib-samp"
    ):
        token_windows([text], tokenizer, 10, 101)
    with pytest.raises(OctavoError, match=r"ptb \(ptb.txt\) has 1,000 tokens"):
        token_windows(texts, tokenizer, 1, 2000)
    with pytest.raises(OctavoError, match=r"ptb \(ptb.txt\) has 1,000 tokens and one window needs 1,999"):
        consecutive_windows(texts, tokenizer, 2000)


@pytest.mark.parametrize(
    ("count", "length", "share", "says"),
    [(0, 10, 0.0, "at least 1"), (1, 1, 0.0, "at least 2"), (1, 10, 1.5, "between 0 and 1"), (1, 10, -0.1, "0 and 1")],
)
def test_senseless_requests(pairs: Any, count: int, length: int, share: float, says: str) -> None:
    with pytest.raises(OctavoError, match=says):
        token_windows([PROSE], pairs, count, length, chat_share=share)


def test_a_text_denser_at_its_end_still_fills_windows() -> None:
    text = "日本語 " * 200 + "a " * 4000  # three bytes a character, then one
    for seed in range(3):
        found = token_windows([text], bytes_tokenizer(bos=False), 6, 1000, seed=seed)
        assert {len(window) for window in found} == {1000}


def test_little_is_tokenized(pairs: Any) -> None:
    counting = Counting(pairs)
    text = PROSE * 100  # 14 MB
    assert len(token_windows([text], counting, 8, 256)) == 8
    assert counting.chars < 60_000
    counting.chars = 0
    assert len(consecutive_windows([text], counting, 256, limit=8)) == 8
    assert counting.chars < 60_000


def test_streams_are_read_as_far_as_needed(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_windows, "POOL", 10_000)
    read: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            read.append(len(read))
            yield f"{len(read)} " + "some words of a document " * 20

    assert len(token_windows(Texts("endless", endless), pairs, 4, 100)) == 4
    assert len(read) * 500 < 20_000
    read.clear()
    assert len(consecutive_windows(Texts("endless", endless), pairs, 100, 4)) == 4
    assert len(read) * 500 < 5_000


def test_consecutive_windows(pairs: Any) -> None:
    ids = pairs(PROSE, verbose=False)["input_ids"]
    found = consecutive_windows([PROSE], pairs, 300)
    assert len(found) == len(ids) // 300
    assert list(chain(*found)) == ids[: len(found) * 300]
    assert consecutive_windows(iter([PROSE]), pairs, 300, 5) == found[:5]
    assert consecutive_windows([PROSE], pairs, 300, 10**6) == found

    tokenizer = bytes_tokenizer(bos=True)
    text = "\n\n".join(["abcdefghi"] * 3)  # 31 characters
    parts = ["abcdefghi"] * 3
    assert consecutive_windows(parts, tokenizer, 11) == [
        [BOS, *tokenizer(text[at : at + 10])["input_ids"][1:]] for at in (0, 10, 20)
    ]


def test_consecutive_windows_of_wide_tokens() -> None:
    """The first guess at how much text is needed is too small."""
    words = "".join(f"w{i:020}" for i in range(100))

    class Wide(Counting):
        def __call__(self, text: str, **_: Any) -> Any:
            return {"input_ids": [len(text[at : at + 21]) for at in range(0, len(text), 21)]}

    assert consecutive_windows([words] * 4, Wide(None), 20, 2) == [[21] * 20] * 2
    assert len(consecutive_windows([words] * 4, Wide(None), 20, 20)) == 20


@pytest.fixture(scope="module")
def llm(pamphlet: Model) -> LLM:
    return LLM(pamphlet, max_batch_size=8)


def test_the_model_writes_its_own_windows(llm: LLM) -> None:
    calls: list[tuple[int, int]] = []
    found = self_windows(llm, 8, 48, seed=1, progress=lambda done, total: calls.append((done, total)))
    assert [len(window) for window in found] == [48] * 8
    assert len({tuple(window) for window in found}) == 8
    user, answer = llm.tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert sum(window[0] == user and answer in window[:25] for window in found) >= 2
    assert calls[-1] == (8 * 48, 8 * 48)
    assert calls == sorted(calls)
    llm.engine.scheduler.check()
    assert not llm.engine.busy
    assert self_windows(llm, 8, 48, seed=1) == found
    assert self_windows(llm, 8, 48, seed=2) != found


def test_own_windows_with_bos(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.model, "tokenizer", bytes_tokenizer(bos=True))
    calls: list[tuple[int, int]] = []
    found = self_windows(llm, 3, 20, progress=lambda done, total: calls.append((done, total)))
    assert [(window[0], len(window)) for window in found] == [(BOS, 20)] * 3
    assert calls[-1] == (60, 60)


@pytest.mark.parametrize("length", [2, 5, 30])
def test_own_windows_are_of_the_length_asked_for(llm: LLM, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(llm.model, "tokenizer", bytes_tokenizer(bos=True, template="long preamble " + TEMPLATE))
    found = self_windows(llm, 3, length, chat_share=1.0)
    assert [len(window) for window in found] == [length] * 3


def test_own_windows_without_any_special_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bytes_tokenizer(bos=False)
    tokenizer.bos_token = None
    monkeypatch.setattr(llm.model, "tokenizer", tokenizer)
    monkeypatch.setattr(llm.model, "eos_ids", frozenset())
    assert [len(window) for window in self_windows(llm, 3, 10)] == [10] * 3


def test_own_windows_must_fit_a_session(pamphlet: Model) -> None:
    small = LLM(pamphlet, session_len=64, max_batch_size=2)
    with pytest.raises(OctavoError, match="65 tokens does not fit a session of 64"):
        self_windows(small, 1, 65)
    assert len(self_windows(small, 1, 64)[0]) == 64


def test_an_interrupt_leaves_the_engine_idle(llm: LLM) -> None:
    def interrupt(done: int, _: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_windows(llm, 12, 30, progress=interrupt)
    assert not llm.engine.busy
    llm.engine.scheduler.check()


GPT2 = Path("../shared/data/tokenizers/gpt2")


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"no tokenizer in {GPT2}")
def test_a_bos_that_is_not_put_before_texts() -> None:
    gpt2 = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE.from_file(str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt"))),
        bos_token="<|endoftext|>",
    )
    gpt2.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert opening(gpt2) == []
    assert all(gpt2.bos_token_id not in window for window in token_windows([PROSE], gpt2, 4, 50))
