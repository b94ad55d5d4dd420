"""What answering prompts has come to, and how fast: the last line of `octavo generate`, for one prompt or many."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Answered:
    """Prompts so far, in as many seconds."""

    rows: int = 0  # that have an answer
    refused: int = 0  # that cannot have one
    tokens: int = 0  # of the answers
    seconds: float = 0.0

    def add(self, other: Answered) -> None:
        """Count what another one has; its seconds too, which were one after the other."""
        self.rows += other.rows
        self.refused += other.refused
        self.tokens += other.tokens
        self.seconds += other.seconds

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def done(self) -> int:
        return self.rows + self.refused
