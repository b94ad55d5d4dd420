"""Benchmark tasks in several cache formats: run by lm-evaluation-harness, compared item by item (rows.py).

What was asked is kept (results.py) after every AT_ONCE documents: an interrupted run goes on where it was, and one with
more documents adds to one with fewer. Without a number of documents a few of each task are asked first, in the baseline
alone, and from what they take each benchmark gets as many as an equal share of the time allows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.measure.budget import NO_LIMIT, Budget, duration
from octavo.measure.candidate import Candidate
from octavo.measure.tasks import HERE, Subtask, by_benchmark, require_harness
from octavo.measure.tasks.data_files import load
from octavo.measure.tasks.results import Item, Result, Results, key_of
from octavo.measure.tasks.rows import Row, row
from octavo.models.model import Model
from octavo.progress import Progress, silent

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# What asks documents elsewhere: of a subtask in a format what is kept, and how many there are to be; and the sizes that
# LLM takes.
Elsewhere = Callable[[Sequence[tuple[Candidate, Subtask, Result, int | None]], dict[str, Any]], Iterable[Result]]
AT_ONCE = 32  # documents that are asked together: few-shot examples are drawn anew for each chunk
PILOT, LEAST = 2, 8  # documents of a subtask that are timed first, and of a benchmark that say anything


def run(
    model: Model,
    candidates: Sequence[Candidate],
    subtasks: Sequence[Subtask],
    results: Results,
    *,
    limit: int | None = None,
    budget: Budget = NO_LIMIT,
    session_len: int | None = None,
    max_batch_size: int = 16,
    shots: int | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = silent,
    elsewhere: Elsewhere | None = None,
) -> list[Row]:
    """The benchmarks of `subtasks` in every format, the first of which is the baseline: the first `limit` documents of
    each subtask, or as many as the budget allows. `say` is told how many these are, and what they take.

    With `shots` the first so many documents stand, with their answers, before every question: one context for all, read
    once and then found in the prefix cache. Where they are of the questions' own split, the questions begin after them.
    """
    require_harness()
    asking = _Asking(model, candidates, subtasks, results, session_len, max_batch_size, shots, progress)
    limits: dict[Subtask, int | None] = dict.fromkeys(subtasks, limit)
    if limit is None and budget.seconds is not None:
        limits = asking.affordable(budget, say)
    if elsewhere is not None:
        asking.ask_elsewhere(elsewhere, limits)
    rows = []
    for own in by_benchmark(subtasks).values():
        for candidate in candidates:
            asking.ask(candidate, own, limits)
        found = {c.name: [asking.kept[c.name, subtask] for subtask in own] for c in candidates}
        rows.append(row(own[0].benchmark, [c.name for c in candidates], found))
    return rows


class _Asking:
    """What was asked so far, and the means to ask more."""

    def __init__(
        self,
        model: Model,
        candidates: Sequence[Candidate],
        subtasks: Sequence[Subtask],
        results: Results,
        session_len: int | None,
        max_batch_size: int,
        shots: int | None,
        progress: Progress,
    ):
        self.model, self.candidates, self.subtasks, self.results = model, candidates, subtasks, results
        self.shots = shots
        self.sizes = {"session_len": session_len, "max_batch_size": max_batch_size}
        self.progress = progress
        self.tasks: dict[str, Task] = {}
        self.kept = {
            (c.name, subtask): results.load(key_of(model, c, subtask, session_len, shots))
            for c in candidates
            for subtask in subtasks
        }

    def ask(self, candidate: Candidate, subtasks: Sequence[Subtask], limits: dict[Subtask, int | None]) -> None:
        """Ask what is missing of the first documents of `subtasks`."""
        missing = [subtask for subtask in subtasks if not self.kept[candidate.name, subtask].holds(limits[subtask])]
        if not missing:
            return
        self.tasks = self.tasks or load_tasks(self.subtasks, self.shots)
        llm = candidate.llm(self.model, **self.sizes)
        for subtask in missing:
            task, result = self.tasks[subtask.definition], self.kept[candidate.name, subtask]
            first = _examples_of_its_own(task, subtask.shots(self.shots) or 0)
            result.documents = len(task.eval_docs) - first
            end = min(limits[subtask] or result.documents, result.documents)
            for start in range(len(result.items) // AT_ONCE * AT_ONCE, end, AT_ONCE):
                stop = min(end, start + AT_ONCE)
                begun = perf_counter()
                title = f"{subtask.name} in {candidate.name}, {start + 1}–{stop} of {end}"
                asked = range(first + start, first + stop)
                result.items[start:] = ask_chunk(llm, task, asked, title, self.progress)
                result.seconds += perf_counter() - begun
                self.results.save(result)

    def ask_elsewhere(self, elsewhere: Elsewhere, limits: dict[Subtask, int | None]) -> None:
        """Have asked what is missing, and keep it."""
        missing = [
            (candidate, subtask, self.kept[candidate.name, subtask], limits[subtask])
            for candidate in self.candidates
            for subtask in self.subtasks
            if not self.kept[candidate.name, subtask].holds(limits[subtask])
        ]
        for (candidate, subtask, *_), result in zip(
            missing, elsewhere(missing, self.sizes | {"shots": self.shots}), strict=True
        ):
            self.kept[candidate.name, subtask] = result
            self.results.save(result)

    def affordable(self, budget: Budget, say: Callable[[str], None]) -> dict[Subtask, int | None]:
        """How many documents of each subtask an equal share of the time allows, and what was asked before."""
        begun, baseline = perf_counter(), self.candidates[0]
        for own in by_benchmark(self.subtasks).values():
            self.ask(baseline, own, dict.fromkeys(own, PILOT))
        groups = by_benchmark(self.subtasks)
        share = budget.less(perf_counter() - begun).part(1 / len(groups))
        limits: dict[Subtask, int | None] = {}
        for name, own in groups.items():
            timed = [self.kept[baseline.name, subtask] for subtask in own]
            each = len(self.candidates) * sum(result.seconds / max(1, len(result.items)) for result in timed)
            before = min(len(self.kept[c.name, subtask].items) for c in self.candidates for subtask in own)
            assert share.seconds is not None
            most = max(result.documents or 0 for result in timed)
            count = min(most, max(before + int(share.seconds / each), -(-LEAST // len(own))))
            limits |= dict.fromkeys(own, count)
            seconds = max(0, count - before) * each
            many = f" of each of {len(own)} subtasks" if len(own) > 1 else ""
            least = "; fewer would say nothing" if not share.holds(seconds) else ""
            say(f"{name}: {count} of {most} documents{many}, about {duration(seconds)}{least}")
        return limits


def _examples_of_its_own(task: Task, shots: int) -> int:
    """How many of the questions are the examples: all `shots`, or none where these are of another split."""
    with quiet():
        examples = list(task.fewshot_docs() or ())[:shots]
    return shots if examples == [task.eval_docs[i] for i in range(len(examples))] else 0


def load_tasks(subtasks: Sequence[Subtask], shots: int | None = None) -> dict[str, Task]:
    """The harness's tasks by their names there, with documents from the subtasks' files, and the first `shots` as
    examples."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = sorted({root / subtask.benchmark.harness if subtask.benchmark.harness else HERE for subtask in subtasks})
    members: list[dict[str, Any]] = []
    for subtask in subtasks:
        member: dict[str, Any] = {"task": subtask.definition}
        if subtask.shots(shots) is not None:
            member |= {"num_fewshot": shots, "fewshot_config": {"sampler": "first_n"}}
        if subtask.files:
            data_dir = next(iter(subtask.files.values())).parents[1]
            member["custom_dataset"] = load
            member["dataset_kwargs"] = {"benchmark": subtask.name, "data_dir": str(data_dir)}
            splits = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
            member |= {name: split if split in subtask.files else None for name, split in splits.items()}
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
            if any(not subtask.files for subtask in subtasks):
                remedy = "check the network, or name a directory of their raw files with --data-dir"
            raise OctavoError(
                f"the documents of {', '.join(by_benchmark(subtasks))} cannot be loaded [{reason}]: {remedy}"
            ) from error


def ask_chunk(llm: LLM, task: Task, documents: range, title: str, progress: Progress) -> list[Item]:
    """What a format answers to these documents, which begin at a whole chunk."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    from octavo.measure.tasks.harness import OctavoLM

    progress(title, 0, 0)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED + documents.start)  # the same examples in every format
    with quiet():
        found = evaluate(
            OctavoLM(llm, progress=partial(progress, title)),
            {"tasks": {task.task_name: task}},
            samples={task.task_name: list(documents)},
            bootstrap_iters=0,
            log_samples=True,
        )
    items: dict[int, Item] = {}
    for sample in found["samples"][task.task_name]:
        item = items.setdefault(sample["doc_id"], {"prompt": sample["prompt_hash"]})
        item |= {f"{metric},{sample['filter']}": float(sample[metric]) for metric in sample["metrics"]}
    return [items[i] for i in sorted(items)]


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
