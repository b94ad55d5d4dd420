"""Measurements on a cluster: every worker loads the model and takes a part, and the parts add up to one run.

Statistics of a calibration are merged as they are summed (quant/sums.py), a comparison on a text is kept token by token
until all windows are read, and tasks are kept document by document: nothing is averaged before it is all there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from octavo.calibrate import Observe, Observed, observed
from octavo.errors import OctavoError, one_line
from octavo.measure.accuracy.compare import Measured, measured
from octavo.measure.candidate import Candidate
from octavo.measure.tasks import Part
from octavo.measure.tasks.results import Result, Results
from octavo.measure.tasks.run import Elsewhere, run
from octavo.models.model import Model
from octavo.ray.cluster import Placement

Windows = Sequence[Sequence[int]]
Progress = Callable[[int], None]  # how many are done
Loading = dict[str, Any]  # arguments of Model.load


def observing(loading: Loading, place: Placement, progress: Progress) -> Observe:
    """`observed` on the cluster, for `calibrate`."""

    def observe(windows: Windows, offsets: Sequence[int]) -> Observed:
        parts = _parts(len(windows), place.count)
        jobs = [(_observed, (loading, windows[part], offsets[part], part.start)) for part in parts]
        found: list[Observed] = _all(jobs, place, lambda i: progress(parts[i].stop - parts[i].start))
        total, *others = found
        for other in others:
            for layer, statistics in other.items():
                total[layer].merge(statistics)
        return total

    return observe


def comparing(
    loading: Loading, baseline: Loading | None, candidates: Sequence[Candidate], place: Placement, progress: Progress
) -> Callable[[Windows], list[Measured]]:
    """`measured` on the cluster; `baseline` loads the model that candidates name which are not of the first."""

    def measure(windows: Windows) -> list[Measured]:
        parts = _parts(len(windows), place.count)
        others = [candidate.model is not None and baseline is not None for candidate in candidates]
        plain = [replace(candidate, model=None) for candidate in candidates]
        jobs = [(_measured, (loading, baseline, plain, others, windows[part])) for part in parts]
        found: list[list[Measured]] = _all(jobs, place, lambda i: progress(parts[i].stop - parts[i].start))
        return [Measured.of_all(own) for own in zip(*found, strict=True)]

    return measure


def asking(loading: Loading, place: Placement) -> Elsewhere:
    """Tasks on the cluster, for `run`: each part in each format is one job."""

    def ask(asked: Sequence[tuple[Candidate, Part, Result, int | None]], sizes: dict[str, Any]) -> Iterator[Result]:
        jobs = [(_asked, (loading, candidate, part, kept, limit, sizes)) for candidate, part, kept, limit in asked]
        yield from _all(jobs, place, lambda _: None)

    return ask


def _parts(count: int, workers: int) -> list[slice]:
    """Slices of `count` things for as many workers, all but equally many."""
    ends = [count * i // workers for i in range(workers + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def _all(jobs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], place: Placement, done: Progress) -> list[Any]:
    """What the jobs return, in their order; `done` is called with the number of each that ends. A worker that dies has
    its job done again by another. Raises OctavoError for what the model or the machines refuse."""
    remote = [ray.remote(num_cpus=place.cpus, num_gpus=place.gpus)(function) for function, _ in jobs]
    refs = [task.remote(*arguments) for task, (_, arguments) in zip(remote, jobs, strict=True)]
    left = list(refs)
    try:
        while left:
            ready, left = ray.wait(left)
            for ref in ready:
                ray.get(ref)
                done(refs.index(ref))
        return list(ray.get(refs))
    except RayTaskError as error:
        if isinstance(error.cause, OctavoError):
            raise error.cause from None
        raise OctavoError(f"a worker failed: {one_line(error.cause)}") from error
    except RayError as error:
        raise OctavoError(f"the work on the cluster ended: {one_line(error)}") from error


def _observed(loading: Loading, windows: Windows, offsets: Sequence[int], first: int) -> Observed:
    return observed(Model.load(**loading), windows, offsets, first=first)


def _measured(
    loading: Loading, baseline: Loading | None, plain: list[Candidate], others: list[bool], windows: Windows
) -> list[Measured]:
    model = Model.load(**loading)
    other = Model.load(**baseline) if baseline is not None else None
    own = [replace(one, model=other) if is_other else one for one, is_other in zip(plain, others, strict=True)]
    return measured(model, own, windows)


def _asked(
    loading: Loading, candidate: Candidate, part: Part, kept: Result, limit: int | None, sizes: dict[str, Any]
) -> Result:
    with TemporaryDirectory() as directory:
        results = Results(Path(directory))
        results.save(kept)
        run(Model.load(**loading), [candidate], [part], results, limit=limit, **sizes)
        return results.load(kept.key)
