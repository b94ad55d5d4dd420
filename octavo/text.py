"""Between tokens and text: chat prompts, text that grows with its tokens, stop strings."""

import inspect
import re
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import Any

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError

Message = dict[str, Any]  # {"role": "user", "content": …}; a template may know more fields, such as tool_calls
REPLACEMENT = "\ufffd"  # a decoder's mark for bytes that are not yet a character
LONGEST_RUN = 16  # tokens that end in the middle of a character and are waited for


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: BOS for some, nothing for others."""
    bare, full = list(tokenizer("a", add_special_tokens=False)["input_ids"]), list(tokenizer("a")["input_ids"])
    return full[: next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)]


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, begun as the tokenizer begins texts. Where it has BOS as text already, as templates write
    it, there is one."""
    tokens = list(tokenizer(text)["input_ids"])
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos):
        prefix = opening(tokenizer)
        if prefix[-1:] == [tokenizer.bos_token_id] == tokens[len(prefix) : len(prefix) + 1]:
            warnings.warn(
                f"a prompt begins with {bos}, which the tokenizer adds too: one of the two is left out", stacklevel=2
            )
            del tokens[len(prefix)]
    return tokens


def encode_chat(
    tokenizer: Any,
    messages: Rows[Message],
    tools: Rows[Mapping[str, Any]] = (),
    reply: bool = True,
    go_on: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation by the model's chat template, with the prompt for the model's next turn if it is to
    reply, or with the last message left open if it is to `go_on` with it.

    `tools` are JSON descriptions of functions the model may call; raises OctavoError where the template has no place
    for them. `variables` are more that the template may read.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise OctavoError(
            "this model has no chat template; give one with --chat-template FILE, or use `octavo generate`"
        )
    if tools and not takes_tools(tokenizer):
        raise OctavoError("the model's chat template has no place for tools; give one with --chat-template FILE")
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    if taken := [name for name in variables or () if name in own]:
        raise OctavoError(f"{taken[0]} is no variable of chat templates", "chat_template_kwargs")
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=reply,
            continue_final_message=go_on,
            return_dict=True,
            **(variables or {}),
        )
    except Exception as error:  # a template is code of the model's: jinja's errors, and its own raise_exception
        remedy = "change the messages, or give another template with --chat-template FILE"
        raise OctavoError(f"the model's chat template refused the conversation ({error}): {remedy}") from None
    return list(encoded["input_ids"])


def takes_tools(tokenizer: Any) -> bool:
    """Whether the model's chat template reads `tools`."""
    return re.search(r"\btools\b", tokenizer.get_chat_template(tools=[{}])) is not None


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token as it is within a text: alone, a decoder may drop the space that it begins with."""
    alone = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if REPLACEMENT in alone:  # a part of a character
        return alone
    return tokenizer.decode([token, token], clean_up_tokenization_spaces=False)[len(alone) :]


class TextStream:
    """The text of a growing answer, without decoding all of it again for each token: what the tokenizer gives for the
    prompt and the answer, less what it gives for the prompt. (Tokenizers of sentencepiece's kind drop the space that a
    text begins with; an answer decoded alone would lose it.)

    Text is released once it can no longer change: not in the middle of a character, and not while it might be the
    beginning of a stop string. A stop string ends the stream. It is looked for in the text with all special tokens,
    shown or not, and, as in vLLM, only where it ends beyond the first `min_tokens` tokens. `marks` are special tokens
    whose text is shown though the others' is not.
    """

    def __init__(
        self, tokenizer: Any, params: SamplingParams, prompt: Rows[int] = (), marks: Mapping[int, str] | None = None
    ):
        self.tokenizer, self.params, self.marks = tokenizer, params, marks or {}
        self.count = 0  # tokens of the answer
        self.text = ""  # what has been released
        self.stopped_by: str | None = None  # the stop string that ended it
        self.held = ""  # what has not, with the special tokens that are not shown
        self.hidden: list[tuple[int, int]] = []  # where these are in it
        # Tokens [context, read) set the scene for decoding those after them.
        self.ids = self._last(prompt)
        self.context, self.read = 0, len(self.ids)
        self.scene = self._decode(self.ids)

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain."""
        self.ids.append(token)
        self.count += 1
        if mark := self.marks.get(token):
            self._take(mark)
        elif self.params.stop and (name := self._hidden_name(token)):
            self.hidden.append((len(self.held), len(self.held) + len(name)))
            self._take(name)
        elif (new := self._new()) and not new.endswith(REPLACEMENT):
            self._take(new)
            self._advance()
        elif self._hidden_name(token):
            self.ids.pop()  # no text depends on it, and a run of them would be decoded for each
            return ""
        elif len(self.ids) - self.read < LONGEST_RUN or not self._cut_run():
            return ""
        return self._release(len(self.held) - self._uncertain())

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def flush(self) -> str:
        """The rest of the text, half characters and half stop strings included."""
        if not self.stopped:
            self._take(self._new())
            self._advance()
        return self._release(len(self.held))

    def _last(self, prompt: Rows[int]) -> list[int]:
        """The end of a prompt, as far as the text after it depends on it: it has text and begins with a whole
        character."""
        n = 8
        while n < len(prompt):
            text = self._decode(prompt[-n:])
            if text and not text.startswith(REPLACEMENT):
                break
            n *= 2
        return list(prompt[-n:])

    def _new(self, end: int | None = None) -> str:
        """The text of the tokens since `read`. They may complete a character that a prompt ends in the middle of."""
        text = self._decode(self.ids[self.context : end])
        known = self.scene if text.startswith(self.scene) else self.scene.rstrip(REPLACEMENT)
        return text[len(known) :]

    def _advance(self, end: int | None = None) -> None:
        self.context, self.read = self.read, len(self.ids) if end is None else end
        self.scene = self._decode(self.ids[self.context : self.read])

    def _cut_run(self) -> bool:
        """Take the beginning of a run of bytes that are no characters: all of it would be decoded again for each token.
        No character has more than four bytes, so later ones change nothing of it."""
        for end in range(len(self.ids) - 4, len(self.ids) - 8, -1):
            if self._decode(self.ids[self.read : end]) + self._decode(self.ids[end:]) == self._decode(
                self.ids[self.read :]
            ):
                self._take(self._new(end))
                self._advance(end)
                return True
        return False

    def _hidden_name(self, token: int) -> str:
        """A special token as it is written in a stop string, if it is not shown."""
        if not self.params.skip_special_tokens or self._decode([token]):
            return ""
        return self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _take(self, new: str) -> None:
        before = len(self.held)
        self.held += new
        if self.count <= self.params.min_tokens:
            return
        # What a stop string may begin with is held, so it begins there; it ends in the new text.
        starts = [(self.held.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self.params.stop]
        if found := [(at, at + len(stop), stop) for at, stop in starts if at >= 0]:
            start, end, self.stopped_by = min(found)
            self.held = self.held[: end if self.params.include_stop_str_in_output else start]
            self.hidden = [(a, min(b, start)) for a, b in self.hidden if a < start]

    def _uncertain(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if self.stopped:
            return 0
        return max((_overlap(self.held, stop) for stop in self.params.stop), default=0)

    def _release(self, end: int) -> str:
        shown, at = "", 0
        for a, b in self.hidden:
            shown += self.held[at : min(a, end)]
            at = min(b, end)
        shown += self.held[at:end]
        self.held = self.held[end:]
        self.hidden = [(max(a - end, 0), b - end) for a, b in self.hidden if b > end]
        self.text += shown
        return shown

    def _decode(self, ids: Rows[int]) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=self.params.skip_special_tokens, clean_up_tokenization_spaces=False
        )


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` `stop` begins with, short of all of it."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
