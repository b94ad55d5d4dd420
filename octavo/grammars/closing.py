"""A short way to the end of an answer that a grammar holds: closed strings and brackets, and what is still required.

Which tokens may come is the grammar's to say, so the way is found by asking it: first what it forces, then what closes,
then the shortest value. It is not always the shortest way; it is one, and the answer can take it.
"""

from __future__ import annotations

from typing import Any

import torch

OUTSIDE = (b"}", b"]", b'"', b",", b"0")  # of a string: what ends a value comes before what begins one
WITHIN = (b'"', b"x")
LONGEST = 4096  # tokens of a way that is worth looking for


class Closing:
    """Ways to an end in a model's tokens."""

    def __init__(self, tokens: Any, vocab_size: int):
        self.tokens = tokens
        ids = {text: tokens.greedy_tokenize(text.decode()) for text in {*OUTSIDE, *WITHIN}}
        self.ids = {text: found[0] for text, found in ids.items() if len(found) == 1}
        self.bits = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)

    def way(self, matcher: Any, most: int) -> list[int] | None:
        """Tokens after which the answer may end; None if there are more than `most`. `matcher` stays where it is."""
        return self._way(matcher.deep_copy(), min(most, LONGEST))

    def ends(self, matcher: Any, token: int, way: list[int], most: int) -> bool:
        """Whether there is an end within `most` tokens after this one. `way` was one before it, and mostly still is:
        within a string, and for the token that it begins with."""
        after = matcher.deep_copy()
        if after.try_consume_tokens([token]) != 1:
            return False
        if after.is_stopped():
            return True
        known = way[1:] if way[:1] == [token] else way
        if len(known) <= most:
            ahead = after.deep_copy()
            if ahead.try_consume_tokens(known) == len(known) and ahead.is_accepting():
                return True
        return self._way(after, most) is not None

    def _way(self, matcher: Any, most: int) -> list[int] | None:
        way: list[int] = []
        while not matcher.is_accepting():
            following = self._forced(matcher) or self._closer(matcher)
            if len(way) + len(following) > most or not following:
                return None
            if matcher.try_consume_tokens(following) < len(following):
                return None
            way += following
        return way

    def _forced(self, matcher: Any) -> list[int]:
        forced = matcher.compute_ff_bytes()
        if not forced:
            return []
        tokens = self.tokens.tokenize_bytes(forced)
        return tokens[: matcher.validate_tokens(tokens)]

    def _closer(self, matcher: Any) -> list[int]:
        within = b"x" in self.ids and matcher.validate_tokens([self.ids[b"x"]]) == 1
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
