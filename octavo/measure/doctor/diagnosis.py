"""What the doctor found: plain data, and the same as a JSON document.

A format's grade is its mean KL divergence from the 16-bit cache, nats per token, and two standard errors more for what
the windows happen to be. Up to GOOD nobody can tell, up to USABLE it shows in careful tests, beyond that in the text.
What flipping the last bit of a 16-bit cache already costs on this model is good too: no cache can be asked for less.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from octavo.measure.accuracy.compare import Score
from octavo.measure.doctor.inspection import Anatomy, Keys, Widths
from octavo.measure.doctor.selfcheck import SelfCheck

GOOD, USABLE = 1e-3, 3e-2  # nats


@dataclass(frozen=True)
class Finding:
    """One thing to know, in plain words; a warning advises against something."""

    level: Literal["ok", "note", "warning"]
    topic: str
    text: str


@dataclass
class Diagnosis:
    """If not `accepted`, its only finding says why, and nothing else was looked at."""

    model: str
    accepted: bool
    text: str = ""  # what the formats were measured on
    calibrated: str = ""  # how much of it: windows and tokens
    measured: str = ""
    seconds: float = 0.0
    weights: str = ""  # their kind
    processor: str | None = None  # and what is computed in on it; None on a GPU
    slower: list[str] = field(default_factory=list)  # what is not computed in the processor's fastest way, and why
    anatomy: Anatomy | None = None
    self_check: SelfCheck | None = None
    keys: list[Keys] = field(default_factory=list)
    widths: list[Widths] = field(default_factory=list)
    rounding: float = 0.0  # KL of a 16-bit cache with its last bits flipped
    formats: list[Score] = field(default_factory=list)
    sizes: dict[str, float] = field(default_factory=dict)  # format → bytes of a token over those in 16 bits (computed)
    layers: dict[str, list[float]] = field(default_factory=dict)  # format → KL with only that layer of `keys` in it
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def refused(cls, model: str, reason: str) -> Diagnosis:
        return cls(model, accepted=False, findings=[Finding("warning", "binding", reason)])

    @property
    def healthy(self) -> bool:
        """No advice against anything."""
        return all(finding.level != "warning" for finding in self.findings)

    def grade(self, score: Score) -> str:
        """One of good, usable and poor."""
        most = score.kl + 2 * (score.kl_error if math.isfinite(score.kl_error) else 0)
        if most <= max(GOOD, self.rounding):
            return "good"
        return "usable" if most <= USABLE else "poor"

    @property
    def grades(self) -> dict[str, str]:
        """By the formats' names."""
        return {score.name: self.grade(score) for score in self.formats}

    def document(self) -> dict[str, Any]:
        """Ready for JSON, without what is only good for a curve."""
        found = asdict(self) | {"healthy": self.healthy}
        del found["sizes"]  # each stands with its format
        found["formats"] = [
            score.document("kl_by_bin", "cache_alone") | {"grade": self.grade(score), "size": self.sizes[score.name]}
            for score in self.formats
        ]
        return found
