"""How far greedy answers agree: how many first tokens a format's answer shares with the baseline's.

Every format continues the same prompts, in steps of the same composition. Once two answers differ in a token they are
different texts; how far they agree says more to a reader than a divergence in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.measure.candidate import Candidate
from octavo.models.model import Model
from octavo.progress import Progress, silent

Tokens = Sequence[int]


@dataclass
class Agreement:
    """One format's answers beside the baseline's."""

    name: str
    points: list[int | None]  # for each prompt, the tokens that both answers begin with; None: they never part
    median: float  # of the points, where answers that never part count as their length
    quartiles: tuple[float, float]
    equal: int  # answers that never part


def compare_answers(
    model: Model,
    candidates: Sequence[Candidate],
    prompts: Sequence[Tokens],
    tokens: int,
    progress: Progress = silent,
) -> list[Agreement]:
    """How far the greedy answers to `prompts`, `tokens` tokens each whatever they are, agree with the baseline's, which
    is the first candidate."""
    each = len(prompts) * tokens
    answers: dict[str, list[list[int]]] = {}
    for before, candidate in enumerate(candidates):
        llm = candidate.llm(
            model,
            session_len=max(map(len, prompts)) + tokens,
            max_batch_size=len(prompts),
            prefix_caching=False,
        )
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        completed, written = {}, [0] * len(prompts)
        for delta in llm.generate([list(prompt) for prompt in prompts], params, stream=True):
            written[delta.index] += len(delta.sampled)
            if delta.completion is not None:
                if delta.completion.error:
                    raise OctavoError(delta.completion.error)
                completed[delta.index] = delta.completion.token_ids
                written[delta.index] = tokens
            progress(candidate.name, before * each + sum(written), len(candidates) * each)
        answers[candidate.name] = [completed[i] for i in range(len(prompts))]
    first, *others = (candidate.name for candidate in candidates)
    return [agreement(name, answers[name], answers[first], tokens) for name in others]


def agreement(name: str, answers: Sequence[Tokens], baseline: Sequence[Tokens], length: int) -> Agreement:
    points = [
        next((i for i, (own, other) in enumerate(zip(*pair, strict=True)) if own != other), None)
        for pair in zip(answers, baseline, strict=True)
    ]
    ends = [length if point is None else point for point in points]
    low, median, high = quantiles(ends, n=4, method="inclusive") if len(ends) > 1 else ends * 3
    return Agreement(name, points, median, (low, high), points.count(None))
