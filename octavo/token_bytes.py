"""The bytes that a token stands for. Several tokens may make one character, which text alone cannot tell apart."""

import json
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from octavo.text import token_text


class TokenBytes:
    """`TokenBytes(tokenizer)(token)` are the bytes of a token within a text: a space that it begins with is kept.

    Two spellings of bytes are known: that of byte-level BPE (GPT-2's table), and sentencepiece's ("▁" for a space,
    "<0xF0>" for a byte that is no character). The tokens of other tokenizers are decoded, between two others.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self.added = {token: str(one).encode() for token, one in added.items()}
        self.special = frozenset(tokenizer.all_special_ids)  # left out of a text unless it is to have them
        self.spelling = _spelling(tokenizer)
        self._known = cache(self._bytes)

    def __call__(self, token: int) -> bytes:
        return self._known(token)

    def _bytes(self, token: int) -> bytes:
        if token in self.added:
            return self.added[token]
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an embedding padded beyond the vocabulary
            return b""
        if self.spelling == "byte-level":
            table = _byte_level()
            return b"".join(bytes([table[c]]) if c in table else c.encode() for c in piece)
        if self.spelling == "sentencepiece":
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("▁", " ").encode()
        return token_text(self.tokenizer, token).encode()


def _spelling(tokenizer: Any) -> str:
    if hasattr(tokenizer, "sp_model"):
        return "sentencepiece"
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return "unknown"
    told = json.loads(decoder.__getstate__())
    kinds = {told.get("type")} | {one.get("type") for one in told.get("decoders", ())}
    if "ByteLevel" in kinds:
        return "byte-level"
    return "sentencepiece" if kinds & {"ByteFallback", "Metaspace"} else "unknown"


@cache
def _byte_level() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, others for characters from 256 on."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
