"""How sure the mean of a few measurements is."""

import math
from collections.abc import Sequence
from statistics import fmean


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    middle = fmean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))
