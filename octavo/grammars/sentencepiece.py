"""A sentencepiece model as llguidance asks for it."""

from typing import Any

from octavo.token_bytes import TokenBytes


class Pieces:
    """The bytes of every token, and how text becomes tokens."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: list[int]):
        self.model = tokenizer.sp_model
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, eos_ids[0]
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *eos_ids}
        bytes_of = TokenBytes(tokenizer)
        self.tokens: list[bytes] = []
        for token in range(vocab_size):
            known = token < len(self.model)
            if not known or self.model.is_control(token) or self.model.is_unused(token):
                special.add(token)
            self.tokens.append(bytes_of(token) if known else b"<pad>")  # an embedding padded beyond the vocabulary
        self.special_token_ids = sorted(special)
        self.ids = {own: token for token, own in enumerate(self.tokens) if own and token not in special}
        self.longest = max(map(len, self.ids))

    def __call__(self, text: str) -> list[int]:
        """The longest tokens first. sentencepiece itself would put a space before a text that begins a line."""
        rest, tokens = text.encode(), list[int]()
        while size := next((n for n in range(min(self.longest, len(rest)), 0, -1) if rest[:n] in self.ids), 0):
            tokens.append(self.ids[rest[:size]])
            rest = rest[size:]
        return tokens
