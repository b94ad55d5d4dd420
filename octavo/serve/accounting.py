"""What one request came to: a line of the log, and its part in the numbers of `/metrics`."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.completion import Generation
from octavo.serve.errors import ApiError
from octavo.serve.logs import REQUESTS

requests = logging.getLogger(REQUESTS)
LEFT = 499  # the status under which nginx counts a client that left


@dataclass
class Account:
    """Of one request, filled in as it goes through the server. Times are those of time.monotonic()."""

    method: str
    route: str
    client: str = "-"
    key: str = ""  # of its conversation, where several servers share the requests
    status: int = LEFT  # until an answer begins
    start: float = field(default_factory=time.monotonic)
    begun: float | None = None  # when the first of its answers got its place in the engine
    first: float | None = None  # when the first piece of an answer came
    id: str = "-"
    generations: Sequence[Generation] = ()
    n: int = 1  # answers to each prompt
    refused: ApiError | None = None

    @property
    def prompt_tokens(self) -> int:
        """A prompt counts once, however many answers it has."""
        return sum(generation.sequence.num_prompt for generation in self.generations[:: self.n])

    @property
    def cached_tokens(self) -> int:
        return sum(generation.sequence.prefix_hit for generation in self.generations[:: self.n])

    @property
    def generated_tokens(self) -> int:
        return sum(len(generation.sequence.output) for generation in self.generations)

    def log(self) -> None:
        """One line. A request that only looks (GET) and succeeds is worth none: pages and dashboards ask every second.
        Of a refusal the line has the field's name and the code; the message, which says more, at the level debug."""
        if not requests.isEnabledFor(logging.INFO) or (self.method in ("GET", "HEAD") and self.status < 400):
            return
        said = [self.method, self.route, str(self.status), f"id={self.id}"]
        if self.generations:
            said += [f"prompt={self.prompt_tokens}", f"cached={self.cached_tokens}"]
            said += [f"generated={self.generated_tokens}"]
            ends = {generation.sequence.finish_reason or "-" for generation in self.generations}
            said.append("end=" + ",".join(sorted(ends)))
        for name, until in (("queue", self.begun), ("first", self.first), ("total", time.monotonic())):
            if until is not None:
                said.append(f"{name}={until - self.start:.3f}s")
        if self.refused is not None:
            said += [f"{name}={value[:64]!r}" for name in ("code", "param") if (value := getattr(self.refused, name))]
            if requests.isEnabledFor(logging.DEBUG):
                said.append(f"because={self.refused.message!r}")
        requests.info("%s client=%s", " ".join(said), self.client)
