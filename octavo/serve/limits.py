"""What one server takes on. Needs none of the server's packages: the command line tells these defaults without them."""

import os
from dataclasses import dataclass

SMALL = 16 << 10  # bytes of a body that is read on the event loop, in less than a millisecond or two
MAX_SCORES = 1 << 17  # log-probabilities of one request's prompts, which are kept until it is answered: some 20 MB


def keep_few_shapes() -> None:
    """Before a model is loaded: oneDNN, and torch around it, each keep what they have made for 1024 shapes, and a
    server's steps have a new one every time: hundreds of MiB. Both read their limit once."""
    for limit in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(limit, "128")


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    max_queue: int = 256  # answers that wait beyond those that run
    timeout: float = 600.0  # seconds from a request to the end of its answer
    max_body: int = 8 << 20  # bytes of a request
    max_connections: int = 1024  # at a time; less where the process may open fewer files
    patience: float = 30.0  # seconds in which a client must send its request, or read something of its answer
