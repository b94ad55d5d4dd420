"""Results of tasks, kept in a directory: one file for each subtask and format, under a key of all that shapes it.

A file grows with the documents that were asked, from the first on, and is never begun anew: an interrupted run goes on,
and a larger one adds to a smaller one.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from octavo.artefact import replacing
from octavo.errors import require_writable
from octavo.measure.candidate import Candidate
from octavo.measure.tasks import Subtask
from octavo.measure.tasks.data_files import digest
from octavo.models.model import Model
from octavo.quant.format import LayerFormats, dtype_name

Item = dict[str, Any]  # a document's metrics, and the hash of its prompt


@dataclass
class Result:
    """A subtask in one format."""

    key: dict[str, Any]  # all that shapes it
    items: list[Item]  # by document
    seconds: float
    documents: int | None = None  # that there are; None before any was asked

    def holds(self, count: int | None) -> bool:
        """Whether the first `count` documents were asked, or all of them."""
        return self.documents is not None and len(self.items) >= min(count or self.documents, self.documents)


class Results:
    """A directory of results."""

    def __init__(self, directory: Path):
        self.directory = directory
        require_writable(directory, "--results")

    def path(self, key: dict[str, Any]) -> Path:
        mark = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
        return self.directory / f"{key['task']}-{key['kv']}-{mark}.json".replace("/", "_")

    def load(self, key: dict[str, Any]) -> Result:
        """Without items where there is none of that very key, or what is there is incomplete."""
        try:
            found = Result(**json.loads(self.path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Result(key, [], 0.0)
        return found if found.key == key else Result(key, [], 0.0)

    def save(self, result: Result) -> None:
        """Whole or not at all."""
        with replacing(self.path(result.key)) as part:
            part.write_text(json.dumps(asdict(result)), encoding="utf-8")


def key_of(
    model: Model, candidate: Candidate, subtask: Subtask, session_len: int | None, shots: int | None = None
) -> dict[str, Any]:
    """All that shapes a result, but for the number of documents."""
    from octavo import __version__

    own = candidate.model or model
    calibration = None
    if candidate.calibration is not None:
        total = hashlib.sha256(json.dumps(asdict(candidate.calibration.header), sort_keys=True).encode())
        for layer in candidate.calibration.layers:
            for side in ("k", "v"):
                total.update(layer[side]["min"].numpy().tobytes() + layer[side]["max"].numpy().tobytes())
        calibration = total.hexdigest()[:16]
    return {
        "model": own.fingerprint,
        "dtype": dtype_name(own.bound.dtype),
        "computes": dtype_name(own.bound.computes),
        "kv": str(candidate.format),
        **({"layers": list(map(str, candidate.format))} if isinstance(candidate.format, LayerFormats) else {}),
        "calibration": calibration,
        "task": subtask.name,
        **({} if subtask.shots(shots) is None else {"shots": shots}),
        "documents": digest(subtask),
        "session_len": min(own.bound.max_context, session_len or own.bound.max_context),
        "octavo": __version__,
        "lm_eval": version("lm_eval"),
    }
