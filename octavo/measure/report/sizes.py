"""How much a report measures in the time there is: each part has a share, and takes the largest size that fits."""

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.measure.budget import Budget, Fit, Windows
from octavo.measure.pace import Pace

DOCTOR, CALIBRATING, COMPARING, LONG, TIMING = 0.3, 0.1, 0.2, 0.2, 0.2  # shares of the time
CALIBRATED, FEWEST = Windows(16, 512), Windows(4, 256)  # of a calibration of the report's own
COMPARED, LEAST = Windows(6, 1024), Windows(2, 256)  # that formats are compared on
LONGEST, SHORTEST = 8192, 1024  # tokens of the long context
TIMED = (((1, 4, 16), 512), ((1, 4, 16), 256), ((1, 4), 256), ((1,), 128))  # batch sizes, and tokens of a session
TOKENS, ROUNDS = 16, 2  # decode steps that are timed, and how often


@dataclass(frozen=True)
class Sizes:
    """What fits."""

    calibrated: Fit
    compared: Fit
    long: Fit
    batch_sizes: Sequence[int]
    context: int  # of the timings

    def __str__(self) -> str:
        timed = f"speed: {', '.join(map(str, self.batch_sizes))} sessions of {self.context} tokens"
        return "\n".join((f"formats: {self.compared}", f"long contexts: {self.long}", timed))


def choose(pace: Pace, budget: Budget, formats: int, timed: int, context: int) -> Sizes:
    """The sizes for `formats` that are compared and `timed` that are timed, of a model with that context."""

    def reading(size: Windows) -> float:
        return (formats + 1) * pace.read(size.tokens, logits=True)  # once more to see what is clipped

    def long(size: Windows) -> float:
        return formats * (pace.read(size.length, logits=True) + pace.read(size.length))  # a text, and a list of values

    def timing(batch_sizes: Sequence[int], tokens: int) -> float:
        decoding = sum(pace.write(size, TOKENS) for size in batch_sizes)
        return timed * ROUNDS * (pace.read(sum(batch_sizes) * tokens) + decoding)

    def within(size: Windows) -> Windows:
        return Windows(size.count, min(size.length, context))

    room = budget.part(TIMING)
    fitting = [option for option in TIMED if room.holds(timing(*option))]
    batch_sizes, tokens = fitting[0] if fitting else TIMED[-1]
    return Sizes(
        budget.part(CALIBRATING).fit(within(CALIBRATED), within(FEWEST), lambda size: pace.read(size.tokens)),
        budget.part(COMPARING).fit(within(COMPARED), within(LEAST), reading),
        budget.part(LONG).fit(within(Windows(1, LONGEST)), within(Windows(1, SHORTEST)), long),
        batch_sizes,
        min(tokens, context),
    )
