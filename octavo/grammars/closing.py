"""A short way to the end of an answer that a grammar holds: closed strings and brackets, and what is still required.

Which tokens may come is the grammar's to say, so the way is found by asking it: first what it forces, then what closes,
then the shortest value. Its text is then written with as few tokens as the vocabulary has for it. It is not always the
shortest way; it is one, and the answer can take it.
"""

from collections.abc import Iterable
from typing import Any

import torch

OUTSIDE = (b"}", b"]", b'"', b",", b"0")  # of a string: what ends a value comes before what begins one
WITHIN = (b'"', b"xxxxxxxx", b"xxxx", b"xx", b"x")
LONGEST = 4096  # tokens of a way that is worth looking for
MERGED = 12  # tokens, at most, that are worth saving by tokens of several signs


class Closing:
    """Ways to an end of one grammar, in a model's tokens. `marks` are the special tokens that the grammar names."""

    def __init__(self, tokens: Any, vocab_size: int, marks: Iterable[int] = ()):
        self.tokens = tokens
        self.marks = [mark for mark in marks if tokens.is_special_token(mark)]
        ids = {text: tokens.greedy_tokenize(text.decode()) for text in {*OUTSIDE, *WITHIN}}
        self.ids = {text: found[0] for text, found in ids.items() if len(found) == 1}
        self.bits = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)

    def way(self, matcher: Any, most: int) -> list[int] | None:
        """Tokens after which the answer may end; None if there are more than `most`. `matcher` stays where it is."""
        return self._way(matcher, min(most, LONGEST))

    def ends(self, matcher: Any, token: int, way: list[int], most: int) -> bool:
        """Whether there is an end within `most` tokens after this one. `way` was one before it, and mostly still is:
        within a string, and for the token that it begins with."""
        after = matcher.deep_copy()
        if after.try_consume_tokens([token]) != 1:
            return False
        if after.is_stopped():
            return True
        known = way[1:] if way[:1] == [token] else way
        if len(known) <= most and self.completes(after, known):
            return True
        return self._way(after, most) is not None

    def _way(self, matcher: Any, most: int) -> list[int] | None:
        way: list[int] = []
        ahead = matcher.deep_copy()
        while not ahead.is_accepting():
            following = self.forced(ahead) or self._closer(ahead)
            if len(way) + len(following) > most + MERGED or not following:
                return None
            if ahead.try_consume_tokens(following) < len(following):
                return None
            way += following
        if not any(map(self.tokens.is_special_token, way)):
            merged = self.tokens.tokenize_bytes(self.tokens.decode_bytes(way))
            if len(merged) < len(way) and self.completes(matcher, merged):
                way = merged
        return way if len(way) <= most else None

    def completes(self, matcher: Any, way: list[int]) -> bool:
        """Whether the answer may end after these tokens."""
        ahead = matcher.deep_copy()
        return ahead.try_consume_tokens(way) == len(way) and bool(ahead.is_accepting())

    def forced(self, matcher: Any) -> list[int]:
        """The tokens of what must come next. Where a text has the name of a special token in it, letters spell it: the
        library takes them, and not the token that it names itself."""
        text, _, _ = matcher.compute_ff_bytes().partition(b"\xff")  # what begins so is a special token
        if not text:
            return []
        tokens = self.tokens.tokenize_bytes(text)
        if not (taken := matcher.validate_tokens(tokens)):
            tokens = self.tokens.greedy_tokenize(text.decode("utf-8", "ignore"))
            taken = matcher.validate_tokens(tokens)
        return tokens[:taken]

    def _closer(self, matcher: Any) -> list[int]:
        within = b"x" in self.ids and matcher.validate_tokens([self.ids[b"x"]]) == 1
        if within and (mark := self._mark(matcher)):
            return mark
        for text in WITHIN if within else OUTSIDE:
            token = self.ids.get(text)
            if token is not None and matcher.validate_tokens([token]) == 1:
                return [token]
        matcher.unsafe_compute_mask_ptr(self.bits.data_ptr(), self.bits.nbytes)
        found = self.bits.nonzero()
        if not len(found):
            return []
        word = int(found[0])
        bits = int(self.bits[word]) & 0xFFFFFFFF
        return [word * 32 + (bits & -bits).bit_length() - 1]

    def _mark(self, matcher: Any) -> list[int]:
        """A special token that may come next: it ends a string that has such quotes."""
        return next(([mark] for mark in self.marks if matcher.validate_tokens([mark]) == 1), [])
