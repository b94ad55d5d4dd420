"""Tokens with their log-probabilities, as answers tell them: in step with the text that is sent."""

import codecs
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from octavo.completion import Completion
from octavo.engine.prompt_logprobs import Scored
from octavo.engine.sequence import Sampled
from octavo.token_bytes import TokenBytes


@dataclass(frozen=True)
class ShownToken:
    """A token of an answer, and where its text begins in the answer's text, in characters."""

    sampled: Sampled
    offset: int


class TokenTexts:
    """Follows one answer: a token is told once text that it is part of is sent, and not at all if a stop string cut its
    text off. Tokens that are `hidden` have no text."""

    def __init__(self, bytes_of: TokenBytes, hidden: Collection[int]):
        self.bytes_of, self.hidden = bytes_of, hidden
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.sent = 0  # characters of the answer that were sent
        self.length = 0  # and those that its tokens have made
        self.waiting: deque[ShownToken] = deque()

    def take(self, sampled: Iterable[Sampled], text: str, ended: Completion | None) -> list[ShownToken]:
        """The tokens that can be told with this piece of the answer."""
        for one in sampled:
            self.waiting.append(ShownToken(one, self.length))
            self.follow(one.token)
        self.sent += len(text)
        told = []
        whole = ended is not None and not isinstance(ended.stopped_by, str)
        while self.waiting and (whole or self.waiting[0].offset < self.sent):
            told.append(self.waiting.popleft())
        return told

    def follow(self, token: int) -> None:
        """Count the characters that a token makes whole."""
        if token not in self.hidden:
            self.length += len(self.decoder.decode(self.bytes_of(token)))


def chat_logprobs(bytes_of: TokenBytes, tokens: Iterable[ShownToken]) -> list[dict[str, Any]]:
    """Tokens in the form of chat completions."""

    def told(token: int, logprob: float | None) -> dict[str, Any]:
        own = bytes_of(token)
        text = _text(own)
        return {"token": _escaped(own) if text is None else text, "logprob": logprob, "bytes": list(own)}

    return [
        {
            **told(one.sampled.token, one.sampled.logprob),
            "top_logprobs": [told(*other) for other in one.sampled.top.items()],
        }
        for one in tokens
    ]


def text_logprobs(
    bytes_of: TokenBytes,
    tokens: Iterable[ShownToken],
    echo: str = "",
    prompt: Iterable[tuple[int, Scored | None]] = (),
) -> dict[str, Any]:
    """Tokens in the older form of completions. Before them come those of the prompt, where it is echoed: the answer's
    text begins after `echo`."""
    names: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []

    def tell(token: int, logprob: float | None, top: dict[int, float] | None, offset: int) -> None:
        names.append(_key(bytes_of(token)))
        logprobs.append(logprob)
        tops.append(None if top is None or logprob is None else _keyed(bytes_of, {**top, token: logprob}))
        offsets.append(offset)

    echoed = TokenTexts(bytes_of, ())
    for token, scored in prompt:
        logprob, top = (scored.logprob, scored.top) if scored is not None else (None, None)
        tell(token, logprob, top, min(echoed.length, len(echo)))
        if token not in bytes_of.special or echo.startswith(bytes_of(token).decode(), echoed.length):
            echoed.follow(token)  # a special token may be the tokenizer's own, and not in the text
    for one in tokens:
        tell(one.sampled.token, one.sampled.logprob, one.sampled.top, len(echo) + one.offset)
    return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _keyed(bytes_of: TokenBytes, top: dict[int, float]) -> dict[str, float]:
    """Log-probabilities by the names of tokens, all of which differ, best first."""
    found: dict[str, float] = {}
    for token, logprob in sorted(top.items(), key=lambda one: -one[1]):
        own = bytes_of(token)
        key = _key(own)
        if key in found:  # another token of the same text
            key = f"bytes:{_escaped(own)}"
        if key in found:
            key = f"token_id:{token}"
        found[key] = logprob
    return found


def _key(own: bytes) -> str:
    text = _text(own)
    return f"bytes:{_escaped(own)}" if text is None else text


def _text(own: bytes) -> str | None:
    """The text of a token; None if it is no whole characters."""
    try:
        return own.decode()
    except UnicodeDecodeError:
        return None


def _escaped(own: bytes) -> str:
    r"""Bytes that are no text, as OpenAI writes them: \xf0\x9f."""
    return "".join(f"\\x{byte:02x}" for byte in own)
