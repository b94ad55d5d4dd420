"""Benchmark tasks in several cache formats: run by lm-evaluation-harness, compared item by item.

Both formats answer the same items, so the error of their difference is that of the items' differences: far smaller than
the errors of the two scores. Each task's result in each format is a file in a results directory, under a key that holds
all that shapes it; what is there is not run again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.measure.candidate import Candidate
from octavo.measure.tasks import HERE, Benchmark, Part, by_benchmark, require_harness
from octavo.measure.tasks.data_files import digest
from octavo.models.model import Model
from octavo.quant.format import LayerFormats

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Item = dict[str, Any]  # a document's metrics, and the hash of its prompt
Progress = Callable[[str, int, int], None]  # what is running, requests done, of how many


@dataclass
class Result:
    """A part in one format."""

    key: dict[str, Any]  # all that shapes it
    items: list[Item]  # by document
    seconds: float


@dataclass
class Row:
    """A benchmark in all formats; scores and differences are percentages, ± their standard errors."""

    name: str
    kind: str
    metric: str
    higher_is_better: bool
    items: int
    scores: dict[str, float]  # by format, the baseline first
    errors: dict[str, float]
    differences: dict[str, float]  # from the baseline, by the other formats
    difference_errors: dict[str, float]  # paired


class Results:
    """A directory of results."""

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / ".octavo-probe").touch()
            (directory / ".octavo-probe").unlink()
        except OSError as error:
            raise OctavoError(
                f"nothing can be written in {directory} ({error.strerror}): name another --results"
            ) from None

    def path(self, key: dict[str, Any]) -> Path:
        mark = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
        return self.directory / f"{key['task']}-{key['kv']}-{mark}.json".replace("/", "_")

    def load(self, key: dict[str, Any]) -> Result | None:
        """None where there is none of that very key, or what is there is incomplete."""
        try:
            found = Result(**json.loads(self.path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.key == key else None

    def save(self, result: Result) -> None:
        """Whole or not at all."""
        path = self.path(result.key)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(asdict(result)), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise OctavoError(f"{path} cannot be written: {error.strerror}; the same command goes on later") from None


def run(
    model: Model,
    candidates: Sequence[Candidate],
    parts: Sequence[Part],
    results: Results,
    *,
    limit: int | None = None,
    session_len: int | None = None,
    max_batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Row]:
    """The benchmarks of `parts`, the first `limit` documents of each, in every format; the first is the baseline."""
    require_harness()
    keys = {(c.name, part): _key(model, c, part, limit, session_len) for c in candidates for part in parts}
    found = {which: result for which, key in keys.items() if (result := results.load(key)) is not None}
    missing = [part for part in parts if any((c.name, part) not in found for c in candidates)]
    tasks = load_tasks(missing) if missing else {}
    for candidate in candidates:
        todo = [part for part in parts if (candidate.name, part) not in found]
        if not todo:
            continue
        llm = candidate.llm(
            model,
            session_len=session_len,
            max_batch_size=max_batch_size,
        )
        for part in todo:
            which = candidate.name, part
            result = run_task(
                llm, tasks[part.definition], keys[which], limit, f"{part.name} in {candidate.name}", progress
            )
            results.save(result)
            found[which] = result
    return [
        _row(
            parts[0].benchmark,
            [c.name for c in candidates],
            {c.name: [found[c.name, p] for p in parts] for c in candidates},
        )
        for parts in by_benchmark(parts).values()
    ]


def _key(model: Model, candidate: Candidate, part: Part, limit: int | None, session_len: int | None) -> dict[str, Any]:
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
        "dtype": str(own.bound.dtype)[6:],
        "kv": str(candidate.format),
        **({"layers": list(map(str, candidate.format))} if isinstance(candidate.format, LayerFormats) else {}),
        "calibration": calibration,
        "granularity": candidate.granularity,
        "headroom": candidate.headroom,
        "task": part.name,
        "documents": digest(part),
        "limit": limit,
        "session_len": min(own.bound.max_context, session_len or own.bound.max_context),
        "octavo": __version__,
        "lm_eval": version("lm_eval"),
    }


def load_tasks(parts: Sequence[Part]) -> dict[str, Task]:
    """The harness's tasks by their names there, with documents from the parts' files."""
    import lm_eval.tasks

    from octavo.measure.tasks.data_files import load

    root = Path(lm_eval.tasks.__file__).parent
    folders = sorted({root / part.benchmark.harness if part.benchmark.harness else HERE for part in parts})
    members: list[dict[str, Any]] = []
    for part in parts:
        member: dict[str, Any] = {"task": part.definition}
        if part.files:
            data_dir = next(iter(part.files.values())).parents[1]
            member["custom_dataset"] = load
            member["dataset_kwargs"] = {"benchmark": part.name, "data_dir": str(data_dir)}
            splits = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
            member |= {name: split if split in part.files else None for name, split in splits.items()}
        members.append(member)
    with quiet():
        try:
            manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
            return manager.load({"group": "octavo", "task": members})["tasks"]
        except OctavoError:
            raise
        except Exception as error:  # the many ways a network or a file fails
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            remedy = "fetch their files again"
            if any(not part.files for part in parts):
                remedy = "check the network, or name a directory of their raw files with --data-dir"
            raise OctavoError(
                f"the documents of {', '.join(by_benchmark(parts))} cannot be loaded [{reason}]: {remedy}"
            ) from error


def run_task(
    llm: LLM, task: Task, key: dict[str, Any], limit: int | None, title: str, progress: Progress | None
) -> Result:
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    from octavo.measure.tasks.harness import OctavoLM

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(title, done, total)

    tell(0, 0)
    start = perf_counter()
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # the same examples in every format
    with quiet():
        found = evaluate(
            OctavoLM(llm, progress=tell),
            {"tasks": {task.task_name: task}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    items: dict[int, Item] = {}
    for sample in found["samples"][task.task_name]:
        item = items.setdefault(sample["doc_id"], {"prompt": sample["prompt_hash"]})
        item |= {f"{metric},{sample['filter']}": float(sample[metric]) for metric in sample["metrics"]}
    return Result(key, [items[i] for i in sorted(items)], round(perf_counter() - start, 1))


def _row(benchmark: Benchmark, names: Sequence[str], results: dict[str, list[Result]]) -> Row:
    values: dict[str, list[float]] = {}
    prompts: dict[str, list[str]] = {}
    for name in names:
        items = [item for result in results[name] for item in result.items]
        values[name] = [100 * item[benchmark.metric] for item in items]
        prompts[name] = [item["prompt"] for item in items]
    base, *others = names
    if any(prompts[name] != prompts[base] for name in others):
        raise OctavoError(
            f"the formats were asked other questions in {benchmark.name}: remove its files from --results"
        )
    changes = {name: [own - old for own, old in zip(values[name], values[base], strict=True)] for name in others}
    return Row(
        name=benchmark.name,
        kind=benchmark.kind,
        metric=benchmark.label,
        higher_is_better=benchmark.higher_is_better,
        items=len(values[base]),
        scores={name: _mean(values[name]) for name in names},
        errors={name: _error(values[name]) for name in names},
        differences={name: _mean(changes[name]) for name in others},
        difference_errors={name: _error(changes[name]) for name in others},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


@contextmanager
def quiet() -> Iterator[None]:
    """The harness talks, and draws bars for what takes no time."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)
