"""What `octavo accuracy` finds, as the parts of its JSON document."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from octavo.cache.size import CacheSize
from octavo.measure.accuracy.compare import Measured, Score, measured, scores
from octavo.measure.accuracy.greedy import compare_answers
from octavo.measure.accuracy.sizes import prompt_length
from octavo.measure.budget import Windows
from octavo.measure.candidate import Candidate
from octavo.measure.machine import describe
from octavo.models.model import Model
from octavo.progress import Progress
from octavo.quant.format import dtype_name


def about(model: Model, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The model, the machine, and what the formats take in theory: computed from the model's geometry."""
    model.bound.expect_rows()
    bytes_ = [CacheSize.of(model.bound.shapes, candidate.format).token for candidate in candidates]
    return {
        "command": "accuracy",
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dtype": dtype_name(model.bound.dtype),
        "computes": dtype_name(model.bound.computes),
        "machine": describe(model.bound.device),
        "baseline": candidates[0].name,
        "theory": [
            {"how": "computed", "format": candidate.name, "bytes_per_token": own, "times_smaller": bytes_[0] / own}
            for candidate, own in zip(candidates, bytes_, strict=True)
        ],
    }


def measure_text(
    model: Model,
    candidates: Sequence[Candidate],
    name: str,
    windows: Sequence[Sequence[int]],
    answers: Windows,
    progress: Progress,
    enough: Callable[[int], bool] = lambda _: False,
    measure: Callable[[Sequence[Sequence[int]]], list[Measured]] | None = None,
) -> dict[str, Any]:
    """Every format over `windows` of the text `name`, until they are `enough`, and its greedy `answers` to the
    beginnings of as many windows. `measure` reads the windows elsewhere."""
    title = f"reading {name}"
    progress(title, 0, 0)
    if measure is None:
        read = measured(model, candidates, windows, partial(progress, title), enough)
    else:
        read = measure(windows)
    found_scores = scores(read)
    found: dict[str, Any] = {
        "how": "measured",
        "name": name,
        "windows": found_scores[0].tokens // (len(windows[0]) - 1),
        "window": len(windows[0]),
        "scores": [score.document("cache_alone") for score in found_scores],  # which kv_loss has
        "kv_loss": _kv_loss(model, candidates, found_scores),
    }
    if not answers.count:
        return found
    prompts = [window[: prompt_length(len(window))] for window in windows[: answers.count]]
    agreements = compare_answers(
        model,
        candidates,
        prompts,
        answers.length,
        lambda _, done, total: progress("writing answers", done, total),
    )
    found["greedy"] = {
        "prompts": len(prompts),
        "prompt_tokens": len(prompts[0]),
        "answer_tokens": answers.length,
        "rows": [asdict(row) for row in agreements],
    }
    return found


def _kv_loss(model: Model, candidates: Sequence[Candidate], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """What each format costs beside the first one with the same weights, nats a token."""
    kinds = [(candidate.model or model).weight_kind for candidate in candidates]
    firsts = {kind: str(candidates[kinds.index(kind)].format) for kind in kinds}
    return [
        {"weights": kind, "format": str(candidate.format), "from": firsts[kind], **asdict(score.cache_alone)}
        for kind, candidate, score in zip(kinds, candidates, scores, strict=True)
        if str(candidate.format) != firsts[kind]
    ]
