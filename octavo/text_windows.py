"""From texts to windows of tokens: what a calibration looks at and what accuracy is measured on.

    token_windows         windows at random places, each starting as a session does
    consecutive_windows   one window after the other, for perplexity
    self_windows          no texts at all: the model writes the windows itself

Texts are laid out as one string, documents with a blank line between, and places are chosen by character: tokenizers
are slow, and only what a window needs is tokenized.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.progress import Count, silent
from octavo.text import encode_chat, opening

if TYPE_CHECKING:
    from octavo.llm import LLM

Window = list[int]

BETWEEN = "\n\n"  # documents in one window: as passages of one prompt, which has no EOS or BOS in its middle
POOL = 1 << 24  # characters that windows are drawn from, at least, where the texts have that many
MOST_CHARS_A_TOKEN = 16  # a pool of that many for each token asked for is always enough
CHAT_SHARE = 0.25  # of the windows go through the chat template, if there is one
SNIPPET = (16, 128)  # tokens of a user's turn that the model wrote itself


def token_windows(
    texts: Iterable[str],
    tokenizer: Any,
    count: int,
    length: int,
    *,
    seed: int = 0,
    chat_share: float = CHAT_SHARE,
) -> list[Window]:
    """`count` windows of exactly `length` tokens from random but reproducible places, spread over all of the texts.

    Each starts as a session does: with what the tokenizer puts before a text, then at the beginning
    of a document where one is near, else at a word; short documents are followed by others. `chat_share` of them are a
    user's turn and its answer in the model's chat template, if it has one. Windows hardly overlap. Endless texts are
    read as far as needed.
    """
    _check(count, length, chat_share)
    rng = random.Random(seed)
    documents = list(_take(texts, max(POOL, MOST_CHARS_A_TOKEN * count * length)))
    rng.shuffle(documents)
    text = BETWEEN.join(documents)
    beginnings = list(accumulate((len(document) + len(BETWEEN) for document in documents[:-1]), initial=0))
    prefix = opening(tokenizer)
    body = _room(length, prefix)

    chars = _chars_a_token(text, tokenizer, rng)
    if len(text) < 1.25 * count * body * chars:  # too close to tell: count
        _check_enough(texts, len(_encode(tokenizer, text)), count, body)
    chats = set(rng.sample(range(count), chats_of(tokenizer, count, chat_share)))
    windows = []
    for i in range(count):
        # A stratum for each window: no place twice, and none left out.
        low, high = len(text) * i // count, len(text) * (i + 1) // count
        start = _start(text, beginnings, low, max(low, high - int(body * chars)), rng)
        question = int(rng.uniform(0.05, 0.5) * body * chars)

        def render(span: str, chat: bool = i in chats, question: int = question) -> Window:
            return _chat(tokenizer, span, question) if chat else prefix + _encode(tokenizer, span)

        window = _fill(text, start, render, length, chars)
        if window is None:
            _check_enough(texts, len(_encode(tokenizer, text)), count, body)
            raise OctavoError(f"{_name(texts)} fills no window of {length} tokens: lower --calib-seqlen")
        windows.append(window)
    rng.shuffle(windows)
    return windows


def consecutive_windows(texts: Iterable[str], tokenizer: Any, length: int, limit: int | None = None) -> list[Window]:
    """The texts from their beginning in windows of `length` tokens that do not overlap, at most `limit`; the rest that
    fills none is dropped. Each starts with what the tokenizer puts before a text. Without a limit all texts are read.
    """
    _check(1 if limit is None else limit, length)
    prefix = opening(tokenizer)
    stride = _room(length, prefix)
    wanted = None if limit is None else limit * stride
    chars = None if wanted is None else 6 * wanted
    documents, text = iter(texts), ""
    while True:
        if chars is None or len(text) < chars:
            more = list(_take(documents, None if chars is None else chars - len(text)))
            text = BETWEEN.join([text, *more] if text else more)
        tokens = _encode(tokenizer, text[:chars])
        if chars is None or wanted is None or len(text) < chars or len(tokens) > wanted + 8:  # a cut word has its own
            break
        chars *= 2
    found = len(tokens) // stride
    if not found:
        raise OctavoError(
            f"{_name(texts)} has {len(tokens):,} tokens and one window needs {stride:,}: "
            "name a longer text, or a shorter window"
        )
    starts = range(0, stride * (found if limit is None else min(found, limit)), stride)
    return [prefix + tokens[at : at + stride] for at in starts]


def self_windows(
    llm: LLM,
    count: int,
    length: int,
    *,
    seed: int = 0,
    chat_share: float = CHAT_SHARE,
    progress: Count = silent,
) -> list[Window]:
    """`count` windows of exactly `length` tokens that the model writes itself, at temperature 1 and on past the end of
    answers. `llm` is idle and keeps its cache in a raw format; `progress(done, total)` counts tokens.

    A window starts with what the tokenizer puts before a text. Where that is nothing, the model is shown a token that
    ends texts, and the window starts with the token it writes next: what texts begin with. `chat_share` of the windows
    are a user's turn and its answer in the chat template, if there is one; the user quotes a piece of another window.
    """
    _check(count, length, chat_share)
    room = llm.engine.scheduler.max_context
    if length > room:
        raise OctavoError(
            f"a window of {length} tokens does not fit a session of {room}: lower --calib-seqlen or raise --session-len"
        )
    rng = random.Random(seed)
    chats = chats_of(llm.tokenizer, count, chat_share)
    plain = max(1, count - chats)  # at least one, to be quoted
    done, total = 0, (plain + chats) * length

    def write(prompts: list[Window], to: int) -> list[Window]:
        """Continue each prompt to `to` tokens."""
        nonlocal done
        params = [
            SamplingParams(max_tokens=max(1, to - len(p)), temperature=1.0, ignore_eos=True, seed=rng.getrandbits(63))
            for p in prompts
        ]
        sequences = [llm.sequence(prompt[:to], draw) for prompt, draw in zip(prompts, params, strict=True)]
        running = [sequence for sequence in sequences if sequence.num_prompt < to]
        try:
            for sequence in running:
                llm.engine.add(sequence)
            while not all(sequence.finished for sequence in running):
                done += len(llm.engine.step())
                progress(done, total)
        finally:  # an interrupt leaves nothing behind
            for sequence in running:
                llm.engine.finish(sequence)
        if failed := [sequence.error for sequence in running if sequence.error]:
            raise OctavoError(failed[0])
        return [sequence.tokens for sequence in sequences]

    begin = opening(llm.tokenizer)[: length - 1]
    if begin:
        starts = [begin] * plain
        done += plain * len(begin)
    else:
        ends = _text_ends(llm, rng)
        starts = [tokens[1:] for tokens in write([[ends[i % len(ends)]] for i in range(plain)], 2)]
    windows = write(starts, length)
    prompts = [_question(llm.tokenizer, rng.choice(windows), length, rng) for _ in range(chats)]
    done += sum(min(len(prompt), length) for prompt in prompts)
    windows = windows[: count - chats] + write(prompts, length)
    rng.shuffle(windows)
    return windows


def _text_ends(llm: LLM, rng: random.Random) -> list[int]:
    """Tokens after which a text begins: a BOS that is there but not put before texts, or what ends them. A model
    without either is shown tokens at random."""
    words, rows = len(llm.tokenizer), llm.model.bound.vocab_size
    bos = getattr(llm.tokenizer, "bos_token_id", None)
    ends = [token for token in ([bos] if bos is not None else sorted(llm.model.eos_ids)) if token < rows]
    return ends or [rng.randrange(min(words, rows)) for _ in range(64)]


def _question(tokenizer: Any, window: Window, length: int, rng: random.Random) -> Window:
    """A piece of `window` as a user's turn, up to where the answer begins; where possible at most half of `length`."""
    known = [token for token in window if token < len(tokenizer)]  # a model may have more rows than there are words
    size = rng.randint(*SNIPPET)
    at = rng.randint(0, max(0, len(known) - size))
    while True:
        said = tokenizer.decode(known[at : at + size], skip_special_tokens=True).strip()
        prompt = encode_chat(tokenizer, [{"role": "user", "content": said or "Hello"}])
        if len(prompt) <= length // 2 or size == 0:
            return prompt
        size //= 2


def _chat(tokenizer: Any, span: str, question: int) -> Window:
    """The first `question` characters, to the end of the word, as a user's turn, and the rest as its answer."""
    word = re.compile(r"\s").search(span, question, question + 100)
    cut = word.start() if word else max(1, question)
    turns = [{"role": "user", "content": span[:cut].strip()}, {"role": "assistant", "content": span[cut:].strip()}]
    try:  # not verbose: it would warn of texts that are longer than the model's context, and they are cut below
        encoded = tokenizer.apply_chat_template(turns, return_dict=True, tokenizer_kwargs={"verbose": False})
    except Exception as error:  # a template is code of the model's
        raise OctavoError(
            f"the model's chat template refused a turn and its answer ({error}): name another with --chat-template"
        ) from None
    return list(encoded["input_ids"])


def _fill(text: str, start: int, render: Callable[[str], Window], length: int, chars: float) -> Window | None:
    """`length` tokens of `text` from `start` on, or from further back where it ends too soon; None if it has fewer."""
    size = int(1.1 * length * chars) + 64
    while True:
        tokens = render(text[start : start + size])
        if len(tokens) >= length:
            return tokens[:length]
        if start + size < len(text):
            size *= 2
        elif start > 0:
            start = max(0, start - int(1.5 * (length - len(tokens)) * chars) - 64)
            size = len(text) - start
        else:
            return None


def _start(text: str, beginnings: list[int], low: int, high: int, rng: random.Random) -> int:
    """A random document's beginning between `low` and `high`, or where there is none a random word's."""
    near = beginnings[bisect_left(beginnings, low) : bisect_right(beginnings, high)]
    if near:
        return rng.choice(near)
    at = rng.randint(low, high)
    space = re.compile(r"\s+").search(text, at, at + 100)  # none in scripts without spaces
    return space.end() if space else at


def _chars_a_token(text: str, tokenizer: Any, rng: random.Random) -> float:
    """Estimated on 16 pieces from everywhere."""
    size = 2048
    places = [0] if len(text) <= 16 * size else rng.choices(range(len(text) - size), k=16)
    pieces = [text] if len(places) == 1 else [text[at : at + size] for at in places]
    return sum(map(len, pieces)) / max(1, sum(len(_encode(tokenizer, piece)) for piece in pieces))


def _take(texts: Iterable[str], chars: int | None) -> Iterator[str]:
    """Documents until there are `chars` characters."""
    read = 0
    for document in texts:
        yield document
        read += len(document)
        if chars is not None and read >= chars:
            return


def _encode(tokenizer: Any, text: str) -> Window:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def chats_of(tokenizer: Any, count: int, share: float = CHAT_SHARE) -> int:
    """How many of `count` windows go through the chat template."""
    return round(count * share) if getattr(tokenizer, "chat_template", None) else 0


def _room(length: int, prefix: Window) -> int:
    if length <= len(prefix):
        raise OctavoError(f"a window of {length} tokens has no room for text after {len(prefix)}: make it longer")
    return length - len(prefix)


def _name(texts: Iterable[str]) -> str:
    return getattr(texts, "name", "the text")


def _check(count: int, length: int, chat_share: float = 0) -> None:
    if count < 1:
        raise OctavoError(f"{count} windows of text: there must be at least 1")
    if length < 2:
        raise OctavoError(f"windows of {length} tokens: they must have at least 2")
    if not 0 <= chat_share <= 1:
        raise OctavoError(f"the share of chats is {chat_share}; it must be between 0 and 1")


def _check_enough(texts: Iterable[str], tokens: int, count: int, body: int) -> None:
    if tokens < count * body:
        raise OctavoError(
            f"{_name(texts)} has {tokens:,} tokens, but {count} windows of {body:,} take {count * body:,}: "
            "lower --calib-samples or --calib-seqlen, or name a longer text"
        )
