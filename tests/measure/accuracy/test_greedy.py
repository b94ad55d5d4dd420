"""After how many tokens greedy answers part: on answers made up, and on a format that answers as the baseline does."""

from __future__ import annotations

from octavo.measure.accuracy.greedy import agreement, compare_answers
from octavo.measure.candidate import Candidate
from octavo.models.model import Model
from octavo.quant.format import KVFormat


def test_answers_that_never_part_count_as_their_length() -> None:
    found = agreement("int8", [[1, 2, 3, 4], [1, 2, 9, 9], [9, 9, 9, 9]], [[1, 2, 3, 4], [1, 2, 3, 9], [1, 2, 3, 4]], 4)
    assert (found.points, found.median, found.quartiles, found.equal) == ([None, 2, 0], 2, (1, 3), 1)


def test_the_same_cache_gives_the_same_answers_and_four_bits_part_from_it(pamphlet: Model, text_ids: list[int]) -> None:
    kv = {"twin": "fp32", "fp32": "fp32", "int4-token": "int4-token"}
    candidates = [Candidate(name, KVFormat.parse(format)) for name, format in kv.items()]
    prompts = [text_ids[start : start + 48] for start in range(0, 192, 48)]
    done: list[tuple[str, int, int]] = []
    same, coarse = compare_answers(pamphlet, candidates, prompts, 48, lambda *step: done.append(step))
    assert (same.points, same.median, same.equal) == ([None] * 4, 48, 4)
    assert any(point is not None for point in coarse.points)
    assert [step[0] for step in done] == sorted((step[0] for step in done), key=list(kv).index)
    counts = [step[1] for step in done]
    assert counts == sorted(counts), "it only grows"
    assert len(set(counts)) > 20, "while answers are written, not only when they end"
    assert done[-1] == ("int4-token", 576, 576)
