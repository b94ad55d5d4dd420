"""The layers one by one: what each loses in few bits where all others are unquantized."""

from collections.abc import Callable, Sequence
from itertools import count

from octavo.engine.reading import Reading
from octavo.measure.accuracy.compare import losses
from octavo.measure.budget import Budget, Windows, duration
from octavo.measure.pace import Pace
from octavo.models.bind import BoundModel
from octavo.progress import Progress
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat

TOKENS, FEWEST = 128, 32  # of the piece of a window that layers are tried on
# Codes alone; token formats without the calibration, which hides what is special in a layer.
FORMATS = ("int8", "int8-token", "int4-token")


def try_layers(
    bound: BoundModel,
    calibration: Calibration,
    window: Sequence[int],
    pace: Pace,
    budget: Budget,
    tell: Progress,
    say: Callable[[str], None],
) -> dict[str, list[float]]:
    """Mean KL, nats, with a single layer in each of FORMATS, on as much of `window` as the budget allows; nothing where
    that is not worth while."""
    raw = bound.raw_format
    owners = [i for i, shape in enumerate(bound.shapes) if shape.shares is None]
    trials = len(FORMATS) * len(owners)
    fit = budget.fit(
        Windows(1, min(len(window), TOKENS)),
        Windows(1, FEWEST),
        lambda size: (1 + trials) * pace.read(size.tokens, logits=True),
    )
    if not budget.holds(fit.seconds):
        say(f"layers are not tried one by one: that takes {duration(fit.seconds)} more; give a longer --budget")
        return {}
    readings = []
    for format in map(KVFormat.parse, FORMATS):
        own = calibration if format.needs_calibration else None
        for layer in owners:
            formats = [format if i == layer else raw for i in range(len(bound.layers))]
            readings.append(Reading(bound, formats, own))
    done = count()  # 0 is the reading that the others are compared with
    kl = list(losses(readings, window[: fit.size.length], lambda: tell("trying layers", next(done), trials)))
    return {name: kl[i * len(owners) : (i + 1) * len(owners)] for i, name in enumerate(FORMATS)}
