"""How fast a model runs here, measured on a few of its steps in a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from octavo.engine.reading import Reading
from octavo.models.bind import BoundModel

FIRST = 32  # tokens of the first text that is timed; the next are twice as long
ENOUGH = 1.0  # seconds of a text after which none longer is tried
LOGITS = 64  # tokens whose logits are timed
WIDTH = 16  # sequences of a wide decode step


@dataclass(frozen=True)
class Pace:
    """Seconds, by the cache in the model's own type; the other formats differ from it by a few percent."""

    row: float  # of a token that is read
    logits: float  # of its next token's probabilities, beside that
    step: float  # of a step that decodes one sequence
    more: float  # of each sequence more in such a step

    @classmethod
    def measure(cls, bound: BoundModel, longest: int) -> Pace:
        """`longest` is the length of the texts to be read: of long ones attention takes a good part."""
        longest = max(1, min(longest, bound.max_context - 1))
        reading, length = Reading(bound), min(FIRST, longest)
        reading.run(bound.random_tokens(length))  # the first run of all is slow
        while True:
            took = _time(lambda n=length: reading.run(bound.random_tokens(n)))  # type: ignore[misc]
            if took > ENOUGH or length >= longest:
                break
            length = min(2 * length, longest)
        row, rows = took / length, min(LOGITS, longest)

        def probabilities() -> None:
            for logits in reading.logits(bound.random_tokens(rows)):
                logits.log_softmax(-1).exp()

        one, wide = (_time(lambda n=n: _decode(reading, n)) for n in (1, WIDTH))  # type: ignore[misc]
        return cls(row, max(0.0, _time(probabilities) / rows - row), one, max(0.0, wide - one) / (WIDTH - 1))

    def read(self, tokens: int, logits: bool = False) -> float:
        """Of texts of `tokens` tokens in all."""
        return tokens * (self.row + self.logits * logits)

    def write(self, count: int, length: int, most: int | None = None) -> float:
        """Of decoding `length` tokens of `count` sequences, all or `most` at a time."""
        rounds = 1 if most is None else -(-count // most)
        return length * (rounds * self.step + (count - rounds) * self.more)


def _decode(reading: Reading, count: int) -> None:
    texts = [[token] for token in reading.bound.random_tokens(count)]
    for _ in reading.steps(texts, [[1] * count], every=False):
        pass


def _time(work: Callable[[], None]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start
