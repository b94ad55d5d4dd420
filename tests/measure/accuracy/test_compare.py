"""The measurement itself: checked against a direct computation on whole logits."""

from __future__ import annotations

import pytest
import torch

from octavo.measure.accuracy.compare import compare
from octavo.measure.candidate import Candidate
from octavo.models.bind import unbound
from octavo.models.model import Model
from octavo.quant.format import KVFormat


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(dtype="float32")


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    return torch.randint(4, 4096, (3, 300), generator=torch.Generator().manual_seed(0)).tolist()


def test_the_baseline_scores_as_transformers_does_and_diverges_from_nothing(
    model: Model, windows: list[list[int]]
) -> None:
    [score] = compare(model, [Candidate("fp32", KVFormat.parse("fp32"))], windows)
    with unbound(model.bound) as hf, torch.inference_mode():
        losses = [hf(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss for w in windows]
    assert score.perplexity == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)
    assert (score.kl, score.kl_max, score.agreement, score.tokens) == (0, 0, 1, 3 * 299)


def test_it_stops_after_the_windows_that_are_enough(model: Model, windows: list[list[int]]) -> None:
    baseline, seen = Candidate("fp32", KVFormat.parse("fp32")), list[int]()
    [score] = compare(model, [baseline], windows, enough=lambda done: seen.append(done) or done == 2)
    assert (seen, score.tokens) == ([1, 2], 2 * 299)


def test_divergence_is_that_of_the_distributions_and_grows_with_fewer_bits(
    model: Model, windows: list[list[int]]
) -> None:
    names = ["fp32", "int8-token", "k8v4", "int4-token"]
    candidates = [Candidate(name, KVFormat.parse(name)) for name in names]
    base, *scores = compare(model, candidates, windows)
    kl = [score.kl for score in scores]
    assert 0 < kl[0] < kl[1] < kl[2]
    assert all(s.kl_p99 >= s.kl and s.kl_max >= s.kl_p99 for s in scores)
    assert base.agreement >= scores[0].agreement > scores[2].agreement


def test_a_simulated_format_is_measured_as_what_it_does_to_k_and_v(model: Model, windows: list[list[int]]) -> None:
    raw = KVFormat.parse("fp32")
    bf16 = Candidate("bf16", KVFormat.parse("bf16"))
    simulated = Candidate("simulated", raw, simulate=lambda x: x.bfloat16().float())
    _, real, copy = compare(model, [Candidate("fp32", raw), bf16, simulated], windows[:1])
    assert copy.kl == pytest.approx(real.kl, rel=1e-6)
    assert copy.kl > 0


def test_the_cache_alone_is_told_beside_the_first_cache_with_the_same_weights(
    model: Model, windows: list[list[int]]
) -> None:
    other = Model.load(dtype="bfloat16")
    raw, token = KVFormat.parse("fp32"), KVFormat.parse("int8-token")
    of_other = [Candidate("W fp32", raw, model=other), Candidate("W int8-token", token, model=other)]
    base, own, other_raw, other_token = compare(
        model, [Candidate("fp32", raw), Candidate("int8-token", token), *of_other], windows
    )
    _, alone = compare(other, [Candidate("fp32", raw), Candidate("int8-token", token)], windows)
    assert (own.cache_alone.kl, own.cache_alone.loss) == (own.kl, own.loss_change)
    assert (base.cache_alone.kl, other_raw.cache_alone.kl, other_raw.cache_alone.loss) == (0, 0, 0)
    assert other_raw.kl > 0
    found = other_token.cache_alone
    assert (found.kl, found.kl_error) == pytest.approx((alone.kl, alone.kl_error))
    assert (found.loss, found.loss_error) == pytest.approx((alone.loss_change, alone.loss_change_error))
