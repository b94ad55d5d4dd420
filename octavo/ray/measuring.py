"""Measurements on a cluster: every worker loads the model once and takes parts, which add up to one run.

Statistics of a calibration are merged as they are summed (quant/statistics.py), a comparison on a text is kept token by
token until all windows are read, and tasks are kept document by document: nothing is averaged before it is all there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import ActorPool

from octavo.calibrate import Observe, Observed, observed
from octavo.errors import OctavoError, one_line
from octavo.measure.accuracy.compare import Measured, measured
from octavo.measure.candidate import Candidate
from octavo.measure.tasks import Subtask
from octavo.measure.tasks.results import Result, Results
from octavo.measure.tasks.run import Elsewhere, run
from octavo.models.model import Model
from octavo.progress import Count
from octavo.ray.cluster import Placement

Windows = Sequence[Sequence[int]]
Loading = dict[str, Any]  # arguments of Model.load
Job = tuple[Callable[..., Any], *tuple[Any, ...]]  # a function and its arguments
EACH = 4  # parts that a worker gets: progress is seen, and one that dies costs little
TRIES = 3  # times that a worker which dies is started anew, and its job done again


class Workers:
    """Processes of the cluster, which keep the models that they have loaded; they end with this."""

    def __init__(self, place: Placement):
        worker = ray.remote(num_cpus=place.cpus, num_gpus=place.gpus, max_restarts=TRIES, max_task_retries=TRIES)
        self.count = place.count
        self.pool = ActorPool([worker(_Worker).remote() for _ in range(place.count)])

    def parts(self, count: int) -> list[slice]:
        """`count` things cut into some slices for each worker, all but equal."""
        ends = [count * i // (EACH * self.count) for i in range(EACH * self.count + 1)]
        return [slice(a, b) for a, b in pairwise(ends) if a < b]

    def all(self, jobs: Sequence[Job], progress: Count = lambda *_: None, total: int = 1) -> list[Any]:
        """What the jobs return, in their order; they are `total` things together, of which `progress` is told how many
        are done. Raises OctavoError for what the model or the machines refuse."""
        for job in enumerate(jobs):
            self.pool.submit(lambda worker, job: worker.do.remote(*job), job)
        found: dict[int, Any] = {}
        try:
            while self.pool.has_next():
                number, result = self.pool.get_next_unordered()
                found[number] = result
                progress(total * len(found) // len(jobs), total)
            return [found[number] for number in range(len(jobs))]
        except RayTaskError as error:
            if isinstance(error.cause, OctavoError):
                raise error.cause from None
            raise OctavoError(f"a worker failed: {one_line(error.cause)}") from error
        except RayError as error:
            raise OctavoError(f"the work on the cluster ended: {one_line(error)}") from error


class _Worker:
    def do(self, number: int, job: Job) -> tuple[int, Any]:
        function, *arguments = job
        return number, function(*arguments)


def observing(loading: Loading, workers: Workers, progress: Count) -> Observe:
    """`observed` on the cluster, for `calibrate`."""

    def observe(windows: Windows, offsets: Sequence[int]) -> Observed:
        parts = workers.parts(len(windows))
        jobs: list[Job] = [(_observed, loading, windows[part], offsets[part], part.start) for part in parts]
        found: list[Observed] = workers.all(jobs, progress, len(windows))
        total, *others = found
        for other in others:
            for layer, statistics in other.items():
                total[layer].merge(statistics)
        return total

    return observe


def comparing(
    loading: Loading, baseline: Loading | None, candidates: Sequence[Candidate], workers: Workers, progress: Count
) -> Callable[[Windows], list[Measured]]:
    """`measured` on the cluster; `baseline` loads the model that candidates name which are not of the first."""

    def measure(windows: Windows) -> list[Measured]:
        each = [baseline if candidate.model is not None and baseline else loading for candidate in candidates]
        plain = [replace(candidate, model=None) for candidate in candidates]
        jobs: list[Job] = [(_measured, each, plain, windows[part]) for part in workers.parts(len(windows))]
        found: list[list[Measured]] = workers.all(jobs, progress, len(windows))
        return [Measured.of_all(own) for own in zip(*found, strict=True)]

    return measure


def asking(loading: Loading, workers: Workers) -> Elsewhere:
    """Tasks on the cluster, for `run`: each subtask in each format is one job."""

    def ask(asked: Sequence[tuple[Candidate, Subtask, Result, int | None]], sizes: dict[str, Any]) -> Iterator[Result]:
        jobs: list[Job] = [(_asked, loading, *one, sizes) for one in asked]
        yield from workers.all(jobs)

    return ask


@lru_cache(2)
def _model(loading: tuple[tuple[str, Any], ...]) -> Model:
    return Model.load(**dict(loading))


def _observed(loading: Loading, windows: Windows, offsets: Sequence[int], first: int) -> Observed:
    return observed(_model(tuple(loading.items())), windows, offsets, first=first)


def _measured(each: Sequence[Loading], plain: Sequence[Candidate], windows: Windows) -> list[Measured]:
    """`each` loads the model of a candidate."""
    models = [_model(tuple(loading.items())) for loading in each]
    return measured(models[0], [replace(one, model=own) for one, own in zip(plain, models, strict=True)], windows)


def _asked(
    loading: Loading, candidate: Candidate, subtask: Subtask, kept: Result, limit: int | None, sizes: dict[str, Any]
) -> Result:
    with TemporaryDirectory() as directory:
        results = Results(Path(directory))
        results.save(kept)
        run(_model(tuple(loading.items())), [candidate], [subtask], results, limit=limit, **sizes)
        return results.load(kept.key)
