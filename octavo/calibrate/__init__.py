"""Calibration: what a model's K and V look like, kept beside the model so that formats can be made to fit them.

observing.py   a model runs over windows of text, and the statistics of its K and V are taken
positions.py   where the windows stand
serving.py     the calibration that a format is served with, made first where there is none; warnings
"""

from octavo.calibrate.observing import Observe, Observed, calibrate, observed
from octavo.calibrate.serving import calibration_for, choose_scales, warn_outside, warn_uncalibrated

__all__ = [
    "Observe", "Observed", "calibrate", "calibration_for", "choose_scales", "observed", "warn_outside",
    "warn_uncalibrated",
]  # fmt: skip
