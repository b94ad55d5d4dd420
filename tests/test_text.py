"""Text that grows with its tokens is the text of all the tokens, and stop strings cut it where they begin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.models.model import BUNDLED, Model
from octavo.text import LONGEST_RUN, REPLACEMENT, TextStream, encode_chat, token_text
from octavo.token_bytes import TokenBytes

PIECES = ("▁", "▁a", "a", "b", "▁the", "the", "re", "▁中", "中", "!", ".", "\n")


def by_bytes() -> PreTrainedTokenizerFast:
    """Byte-level, as GPT-2's: any bytes may be split over tokens."""
    return PreTrainedTokenizerFast(tokenizer_file=str(BUNDLED / "tokenizer.json"))


def with_fallback() -> PreTrainedTokenizerFast:
    """As Llama's first: words with a leading ▁, single bytes for what is not in the vocabulary, a space stripped at the
    start of what is decoded."""
    special = ("<unk>", "<s>", "</s>")
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    model = models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTES, FALLBACK = by_bytes(), with_fallback()


def fallback_ids(text: str) -> list[int]:
    """Tokens of a text: pieces where one matches, else bytes."""
    ids, rest = [], text.replace(" ", "▁")
    while rest:
        piece = max((p for p in PIECES if rest.startswith(p)), key=len, default="")
        if piece:
            ids.append(FALLBACK.convert_tokens_to_ids(piece))
        else:
            ids += [3 + byte for byte in rest[0].encode()]
        rest = rest[len(piece) or 1 :]
    return ids


def byte_ids(text: str) -> list[int]:
    """One token a byte: every character that has several is split."""
    letters = BYTES.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [BYTES.convert_tokens_to_ids(letter) for word, _ in letters for letter in word]


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(
    tokenizer: Any, ids: list[int], stop: tuple[str, ...] = (), prompt: list[int] | None = None, **params: Any
) -> tuple[list[str], TextStream]:
    """The pieces, up to a stop or flushed; each piece is checked against what the stream says of itself."""
    text, pieces = TextStream(tokenizer, SamplingParams(stop=stop, **params), prompt or ()), []
    for token in ids:
        pieces.append(text.push(token))
        assert text.text == "".join(pieces)
        if text.stopped:
            break
    pieces.append(text.flush())
    assert text.text == "".join(pieces)
    assert text.flush() == ""
    return pieces, text


def cut(tokenizer: Any, ids: list[int], stop: tuple[str, ...]) -> str:
    """By the definition: the first token after which a stop string is in the text ends it where that string begins."""
    for n in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:n])
        found = [text.find(s) for s in stop if s in text]
        if found and (n == len(ids) or not text.endswith(REPLACEMENT)):
            return text[: min(found)]
    return decode(tokenizer, ids)


texts = st.text(st.sampled_from("ab there中文字é😀👨‍👩‍👧!.\n"), max_size=25)
any_bytes = st.lists(st.one_of(st.integers(0, BYTES.vocab_size - 1), st.integers(4, 259)), max_size=30)

# --- pieces ----------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(ids=any_bytes)
@example(ids=byte_ids("😀") * 2 + byte_ids("中")[:2] + byte_ids("é中"))
@example(ids=byte_ids("中")[1:2] * 21 + byte_ids("😀"))
@example(ids=byte_ids("😀")[:2] * 20 + byte_ids("中"))
def test_pieces_of_any_byte_level_tokens_make_the_full_text(ids: list[int]):
    pieces, _ = stream(BYTES, ids)
    assert "".join(pieces) == decode(BYTES, ids)


@settings(max_examples=200, deadline=None)
@given(text=texts, specials=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 2])), max_size=3))
@example(text="the there 中 😀", specials=[(0, 1), (1, 2)])
def test_pieces_of_byte_fallback_tokens_make_the_full_text_whatever_special_tokens_are_between(text, specials):
    ids = fallback_ids(text)
    for at, token in specials:
        ids.insert(min(at, len(ids)), token)
    pieces, _ = stream(FALLBACK, ids)
    assert "".join(pieces) == decode(FALLBACK, ids)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_no_piece_holds_half_a_character(text: str):
    for tokenizer, ids in ((BYTES, byte_ids(text)), (FALLBACK, fallback_ids(text))):
        pieces, _ = stream(tokenizer, ids)
        assert all(REPLACEMENT not in piece for piece in pieces)


def test_each_piece_comes_with_the_token_that_completes_it():
    ids = byte_ids("a😀b中")
    assert len(ids) == 9
    pieces, _ = stream(BYTES, ids)
    assert pieces == ["a", "", "", "", "😀", "b", "", "", "中", ""]


def test_bytes_that_never_become_a_character_come_with_the_flush():
    ids = byte_ids("ab😀")[:-1]
    pieces, text = stream(BYTES, ids)
    assert pieces[:-1] == ["a", "b", "", "", ""]
    assert pieces[-1] == decode(BYTES, ids)[2:] != ""
    assert not text.stopped


def test_a_replacement_character_that_the_model_wrote_is_text():
    ids = byte_ids(f"a{REPLACEMENT}b")
    pieces, _ = stream(BYTES, ids)
    assert "".join(pieces) == f"a{REPLACEMENT}b"


def test_spaces_between_words_stay_and_the_one_at_the_start_goes():
    pieces, _ = stream(FALLBACK, fallback_ids(" there the a"))
    assert "".join(pieces) == "there the a"


def test_special_tokens_are_not_text():
    end = BYTES.convert_tokens_to_ids("<|end|>")
    pieces, _ = stream(BYTES, [end, *byte_ids("hi"), end, *byte_ids("there"), end])
    assert "".join(pieces) == "hithere"


def test_a_stream_decodes_a_few_tokens_at_a_time_however_long_it_is():
    longest = 0

    def decode_some(ids: list[int], **_: object) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "x" * len(ids)

    text = TextStream(SimpleNamespace(decode=decode_some), SamplingParams())
    assert "".join(text.push(1) for _ in range(500)) == "x" * 500
    assert longest <= 4


def test_a_run_of_special_tokens_is_not_decoded_again_for_each():
    longest = 0

    def decode_some(ids: list[int], **how: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTES.decode(ids, **how)

    text = TextStream(SimpleNamespace(decode=decode_some), SamplingParams())
    run = [BYTES.convert_tokens_to_ids("<|end|>")] * 100
    assert "".join(text.push(token) for token in [*byte_ids("a"), *run, *byte_ids("b")]) == "ab"
    assert longest <= 4


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte-level", "byte fallback"])
def test_a_run_of_bytes_that_are_no_characters_comes_as_it_grows_and_is_not_decoded_again_for_each(tokenizer: Any):
    longest = 0

    def decode_some(ids: list[int], **how: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids, **how)

    tokens = {TokenBytes(tokenizer)(token): token for token in range(len(tokenizer))}
    text = TextStream(SimpleNamespace(decode=decode_some), SamplingParams())
    pieces = [text.push(tokens[bytes([byte])]) for byte in b"a" + b"\x80" * 500]
    assert len("".join(pieces)) > 500 - LONGEST_RUN
    pieces += [text.push(tokens[b"b"]), text.flush()]
    assert "".join(pieces) == "a" + REPLACEMENT * 500 + "b"
    assert longest <= 2 * LONGEST_RUN


def test_an_empty_stream_is_empty_text():
    text = TextStream(BYTES, SamplingParams(stop="stop"))
    assert text.flush() == ""
    assert text.text == ""
    assert not text.stopped


# --- after a prompt --------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(prompt=texts, text=texts, cut=st.integers(0, 60))
@example(prompt="the", text=" the a", cut=1)
@example(prompt=" ", text=" a", cut=1)
def test_an_answer_is_what_the_tokenizer_gives_for_prompt_and_answer_less_what_it_gives_for_the_prompt(
    prompt: str, text: str, cut: int
):
    for tokenizer, ids in ((BYTES, byte_ids(prompt + text)), (FALLBACK, fallback_ids(prompt + text))):
        before, after = ids[:cut], ids[cut:]
        start = decode(tokenizer, before)
        if start.endswith(REPLACEMENT):
            continue  # the prompt ends within a character: see below
        pieces, _ = stream(tokenizer, after, prompt=before)
        assert start + "".join(pieces) == decode(tokenizer, ids)


@pytest.mark.parametrize("skip", [True, False])
def test_the_space_that_an_answer_begins_with_stays_behind_any_prompt_that_has_text(skip: bool):
    answer = fallback_ids(" there the a")
    for prompt in (fallback_ids("the " * 50 + "a"), [1, *fallback_ids("a")], [*fallback_ids("a"), 2]):
        pieces, _ = stream(FALLBACK, answer, prompt=prompt, skip_special_tokens=skip)
        assert pieces[0] == " the"
        assert "".join(pieces) == " there the a"
    assert "".join(stream(FALLBACK, answer, prompt=[1])[0]) == "there the a", "behind BOS alone the text begins"


def test_the_text_of_a_token_is_that_within_a_text():
    words = {token: token_text(FALLBACK, FALLBACK.convert_tokens_to_ids(token)) for token in ("▁", "▁a", "a", "</s>")}
    assert words == {"▁": " ", "▁a": " a", "a": "a", "</s>": "</s>"}
    assert token_text(BYTES, END) == "<|end|>"
    assert token_text(BYTES, byte_ids("中")[0]) == REPLACEMENT


def test_an_answer_that_completes_the_prompts_last_character_begins_with_it():
    for tokenizer, ids in ((BYTES, byte_ids("a中b")), (FALLBACK, fallback_ids("a😀b"))):
        for cut in (2, 3):
            assert "".join(stream(tokenizer, ids[cut:], prompt=ids[:cut])[0]) == decode(tokenizer, ids)[1:]


def test_a_replacement_character_that_a_prompt_ends_with_is_the_prompts():
    assert "".join(stream(BYTES, byte_ids("b"), prompt=byte_ids(f"a{REPLACEMENT}"))[0]) == "b"


# --- special tokens --------------------------------------------------------------------------------------------------

END = BYTES.convert_tokens_to_ids("<|end|>")


def test_special_tokens_are_text_where_they_are_not_skipped():
    pieces, _ = stream(BYTES, [*byte_ids("hi"), END, *byte_ids("a")], skip_special_tokens=False)
    assert "".join(pieces) == "hi<|end|>a"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("tokenizer", "ids", "stop", "text"),
    [
        (BYTES, [*byte_ids("hi"), END, *byte_ids("there")], "<|end|>", "hi"),
        (BYTES, [*byte_ids("hi"), END, *byte_ids("there")], "i<|end|>th", "h"),  # over five tokens
        (BYTES, [*byte_ids("hi"), END, END, *byte_ids("a")], "<|end|><|end|>", "hi"),
        (BYTES, [*byte_ids("hi"), END, *byte_ids("\n")], "<|end|>\n", "hi"),
        (FALLBACK, [*fallback_ids("the a"), 2, *fallback_ids("b")], "</s>", "the a"),
        (FALLBACK, [*fallback_ids("the a"), 2, *fallback_ids("b")], "a</s>b", "the "),
    ],
)
def test_a_stop_string_that_names_a_special_token_stops_whether_it_is_shown_or_not(tokenizer, ids, stop, text, skip):
    pieces, streamed = stream(tokenizer, ids, (stop,), skip_special_tokens=skip)
    assert ("".join(pieces), streamed.stopped) == (text, True)
    pieces, _ = stream(tokenizer, ids, (stop,), skip_special_tokens=skip, include_stop_str_in_output=True)
    assert "".join(pieces) == text + stop


def test_a_special_token_that_might_have_begun_a_stop_string_is_hidden_when_it_did_not():
    ids = [*byte_ids("hi"), END, *byte_ids("there"), END]
    pieces, text = stream(BYTES, ids, ("<|end|>the end", "<|end|>!"))
    assert ("".join(pieces), text.stopped) == ("hithere", False)
    assert "".join(stream(BYTES, ids, ("<|end|>the end",), skip_special_tokens=False)[0]) == "hi<|end|>there<|end|>"


def test_stop_strings_count_only_where_they_end_beyond_the_first_min_tokens():
    ids = byte_ids("abxab!")
    for least, text in ((0, ""), (1, ""), (2, "abx"), (4, "abx"), (5, "abxab!")):
        assert "".join(stream(BYTES, ids, ("ab",), min_tokens=least)[0]) == text


# --- stop strings ----------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(st.sampled_from("aab!中"), max_size=20),
    stop=st.lists(st.text(st.sampled_from("ab!中"), min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
)
def test_a_stop_string_cuts_the_text_where_it_begins_and_what_was_held_back_is_released_without_it(text, stop):
    for tokenizer, ids in ((BYTES, byte_ids(text)), (BYTES, BYTES(text)["input_ids"]), (FALLBACK, fallback_ids(text))):
        pieces, streamed = stream(tokenizer, ids, stop)
        assert "".join(pieces) == cut(tokenizer, ids, stop)
        assert streamed.stopped == any(s in decode(tokenizer, ids) for s in stop)


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("one STOP two", "STOP", ["o", "n", "e", " ", "", "", "", "", ""]),  # spans four tokens; none of it is shown
        ("a STAB", "STOP", ["a", " ", "", "", "STA", "B", ""]),  # held back, and released when it does not come
        ("a ST", "STOP", ["a", " ", "", "", "ST"]),  # or at the end
        ("aaab!", "aab", ["", "", "a", "", ""]),  # overlaps with itself
        ("abac", "abad", ["", "", "", "abac", ""]),
        ("x中y", "中", ["x", "", "", "", ""]),  # of several bytes
    ],
)
def test_stop_strings_hold_back_just_what_they_might_begin_with(text: str, stop: str, pieces: list[str]):
    assert stream(BYTES, byte_ids(text), (stop,))[0] == pieces


def test_the_stop_string_that_begins_first_cuts():
    ids = BYTES(" there")["input_ids"] + byte_ids("!")
    assert len(ids) == 2, "one token must bring both stops at once"
    pieces, text = stream(BYTES, ids, ("re", "her"))
    assert "".join(pieces) == " t"
    assert text.stopped


def test_the_shorter_of_two_stops_ends_the_text_before_the_longer_is_complete():
    pieces, text = stream(BYTES, byte_ids("xabcd"), ("abcd", "bc"))
    assert "".join(pieces) == "xa"
    assert text.count == 4


def test_a_stop_string_in_what_only_the_flush_brings_still_counts():
    ids = [*byte_ids("a"), *byte_ids("中")[:2]]
    text = TextStream(BYTES, SamplingParams(stop=REPLACEMENT))
    for token in ids:
        text.push(token)
    text.flush()
    assert text.text == "a"
    assert text.stopped


def test_a_stop_string_of_other_bytes_than_the_texts_never_stops_it():
    pieces, text = stream(BYTES, byte_ids("中文"), ("文中",))
    assert "".join(pieces) == "中文"
    assert not text.stopped


# --- chat ------------------------------------------------------------------------------------------------------------


def test_a_conversation_becomes_tokens_that_end_with_the_prompt_for_the_answer(pamphlet: Model):
    messages = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Tell me more."},
    ]
    ids = encode_chat(pamphlet.tokenizer, messages)
    assert all(isinstance(token, int) for token in ids)
    assert pamphlet.tokenizer.decode(ids) == (
        "<|user|>Hi.<|end|><|assistant|>Hello!<|end|><|user|>Tell me more.<|end|><|assistant|>"
    )


def test_a_model_without_a_template_names_the_remedies():
    with pytest.raises(OctavoError, match=r"no chat template.*--chat-template.*octavo generate"):
        encode_chat(FALLBACK, [{"role": "user", "content": "Hi"}])


def test_what_a_template_refuses_is_said_in_its_words():
    tokenizer = by_bytes()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(OctavoError, match="roles must alternate"):
        encode_chat(tokenizer, [{"role": "user", "content": "Hi"}])


def test_a_stop_string_of_any_length_costs_no_more_than_the_text():
    ids = byte_ids("a" * 500 + "b" * 500)
    pieces, _ = stream(BYTES, ids, ("a" * 1024, "b" + "c" * 1023))
    assert "".join(pieces) == "a" * 500 + "b" * 500
    assert len(pieces[-1]) == 1, "what may go on is held back, and no more"
