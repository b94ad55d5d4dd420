"""What a request gets back: a `Completion`, and `Delta`s while it grows; `Generation` makes them in the engine."""

from dataclasses import dataclass, field
from typing import Protocol

from octavo.engine.sequence import FinishReason, Sampled, Sequence
from octavo.text import TextStream


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str
    token_ids: list[int]  # the one that ended it included
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    sampled: list[Sampled]  # tokens with their log-probabilities, where asked for
    error: str | None = None  # why it ended, if the reason is "error"
    stopped_by: str | int | None = None  # the stop string, or the one of `stop_token_ids`, that ended it


@dataclass(frozen=True)
class Delta:
    """A piece of an answer as it grows: new text of prompt `index`; the completion comes with the last piece."""

    index: int
    text: str
    completion: Completion | None = None
    sampled: list[Sampled] = field(default_factory=list)  # the tokens of the text since the piece before


class Outbox(Protocol):
    """Where pieces go."""

    def append(self, delta: Delta, /) -> None: ...


class Generation:
    """A sequence and its growing text, whose pieces go to `outbox`."""

    def __init__(self, index: int, sequence: Sequence, text: TextStream, outbox: Outbox):
        self.index, self.sequence, self.text, self.outbox = index, sequence, text, outbox
        self.told = 0  # tokens that pieces have told of

    def take(self) -> None:
        """The sequence has gained a token, or failed to."""
        if self.sequence.finish_reason == "error" or self._ends_unseen():
            return
        if piece := self.text.push(self.sequence.tokens[-1]):
            self.outbox.append(Delta(self.index, piece, None, self._sampled()))

    def complete(self) -> None:
        """The sequence has ended."""
        sequence = self.sequence
        rest = self.text.flush()
        assert sequence.finish_reason is not None
        completion = Completion(
            text=self.text.text,
            token_ids=sequence.output,
            finish_reason="stop" if self.text.stopped else sequence.finish_reason,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=sequence.prefix_hit,
            sampled=sequence.sampled,
            error=sequence.error,
            stopped_by=self._stopped_by(),
        )
        self.outbox.append(Delta(self.index, rest, completion, self._sampled()))

    def _stopped_by(self) -> str | int | None:
        sequence = self.sequence
        asked = sequence.finish_reason == "stop" and sequence.tokens[-1] in sequence.params.stop_token_ids
        return sequence.tokens[-1] if asked else self.text.stopped_by

    def _ends_unseen(self) -> bool:
        """Whether the latest token ended the answer and is no part of its text."""
        sequence = self.sequence
        ended = sequence.answered > 0 and sequence.tokens[-1] in sequence.stop_ids
        return ended and not sequence.params.include_stop_str_in_output

    def _sampled(self) -> list[Sampled]:
        sampled, start = self.sequence.sampled, self.told
        self.told = len(sampled)
        return sampled[start : self.told - self._ends_unseen()]
