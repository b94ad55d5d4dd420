"""Sampling against plain implementations of its own definition, and against transformers' logits processors.

`expected` computes the distribution of one row in float64 with lists and loops. Draws are compared with it by their
support, exactly, and by a chi-square test whose seeds are fixed.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from octavo.engine.params import MAX_LOGPROBS, SamplingParams
from octavo.engine.sampling import argmax, choose, sample
from octavo.engine.sequence import Sampled, Sequence
from octavo.errors import OctavoError
from octavo.models.bind import BoundModel
from octavo.models.model import Model
from tests.engine.driving import drain, engine, run

VOCABULARY = 12
ROW = torch.tensor([1.3, -0.4, 2.1, 0.0, 1.9, -2.2, 0.7, 1.1, -0.9, 0.3, 1.6, -1.5])
DRAWS = 4000
CUTS = (
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 4},
    {"top_k": 1},
    {"top_k": 500},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"top_p": 0.999},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 8, "top_p": 0.9, "min_p": 0.15, "repetition_penalty": 1.3},
)
SEEN = [2, 5, 5, 4]


def expected(row: Tensor, params: SamplingParams, seen: list[int]) -> list[float]:
    """Probability of each token, by the definitions: penalty, temperature, top-k, top-p, min-p."""
    logits = [float(x) for x in row]
    for token in set(seen):
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    logits = [x / params.temperature for x in logits]
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = ranked[: params.top_k or None]
    weights = {token: math.exp(logits[token] - logits[ranked[0]]) for token in kept}
    total = sum(weights.values())
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= params.top_p:
            break
        nucleus.append(token)
        mass += weights[token] / total
    final = [token for token in nucleus if weights[token] >= params.min_p * weights[ranked[0]]]
    total = sum(weights[token] for token in final)
    return [weights[token] / total if token in final else 0.0 for token in range(len(logits))]


def processors(params: SamplingParams) -> LogitsProcessorList:
    """What transformers makes of the same parameters, in its own order."""
    found = LogitsProcessorList()
    if params.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    found.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        found.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        found.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        found.append(MinPLogitsWarper(params.min_p))
    return found


def draw(row: Tensor, params: list[SamplingParams], seen: list[int]) -> list[int]:
    """One token for each of `params`, all from the same row."""
    sequences = [Sequence(seen, p) for p in params]
    return [s.token for s in sample(row.repeat(len(params), 1), sequences)]


def p_value(counts: Counter[int], probabilities: list[float]) -> float:
    """Of the chi-square test; tokens expected less than five times are taken together."""
    draws = sum(counts.values())
    cells = [(counts[token], draws * p) for token, p in enumerate(probabilities) if draws * p >= 5]
    rest = (draws - sum(seen for seen, _ in cells), draws - sum(due for _, due in cells))
    cells += [rest] if rest[1] > 1 else []
    if len(cells) == 1:
        return 1.0
    statistic = sum((seen - due) ** 2 / due for seen, due in cells)
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)).item()


# --- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 12, 127, 384])
def test_the_best_column_is_torchs_own_among_ties_and_numbers_that_are_none(columns: int):
    """Of few different numbers, of infinite ones, with a NaN, and without a row."""
    x = torch.randint(3, (50, columns), generator=torch.Generator().manual_seed(0)).float()
    x[10:20] = -torch.inf
    x[20:30, columns // 2] = torch.inf
    x[30:40, columns // 3] = torch.nan
    assert torch.equal(argmax(x), x.argmax(-1))
    assert argmax(x[:0]).shape == (0,)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_many_requests_draw_from_the_distribution_that_their_parameters_define(cut: dict):
    params = [SamplingParams(**{"temperature": 1.0, **cut}, seed=seed) for seed in range(DRAWS)]
    probabilities = expected(ROW, params[0], SEEN)
    counts = Counter(draw(ROW, params, SEEN))
    assert all(probabilities[token] for token in counts), "drawn outside the support"
    assert all(counts[token] for token, p in enumerate(probabilities) if p > 10 / DRAWS), "a token never comes"
    assert p_value(counts, probabilities) > 1e-3


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_transformers_processors_keep_the_same_tokens_with_the_same_probabilities(cut: dict):
    params = SamplingParams(**{"temperature": 1.0, **cut})
    scores = processors(params)(torch.tensor([SEEN]), ROW[None].clone())[0]
    torch.testing.assert_close(scores.softmax(-1), torch.tensor(expected(ROW, params, SEEN)), atol=1e-6, rtol=1e-5)
    assert set(draw(ROW, [params] * 500, SEEN)) <= set(scores.isfinite().nonzero().flatten().tolist())


def test_one_request_draws_its_successive_tokens_independently_of_each_other():
    (sequence,) = [Sequence(SEEN, SamplingParams(temperature=1.0, seed=3))]
    for _ in range(DRAWS):
        sequence.tokens.append(sample(ROW[None].clone(), [sequence])[0].token)
    tokens = sequence.output
    probabilities = expected(ROW, sequence.params, SEEN)
    assert p_value(Counter(tokens), probabilities) > 1e-3
    pairs = Counter(a * VOCABULARY + b for a, b in zip(tokens[::2], tokens[1::2], strict=True))
    assert p_value(pairs, [p * q for p in probabilities for q in probabilities]) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20, unique=True),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.3, 3),
)
def test_no_draw_is_ever_outside_the_support(row, temperature, top_k, top_p, min_p, penalty):
    row = torch.tensor(row)
    asked = {"temperature": temperature, "top_k": top_k, "repetition_penalty": penalty}
    params = SamplingParams(**asked, top_p=top_p, min_p=min_p, seed=1)
    # In float64 the border of a cut may lie a rounding away: allow what cuts a little looser would keep.
    looser = SamplingParams(**asked, top_p=min(1.0, top_p + 1e-4), min_p=max(0.0, min_p - 1e-4))
    support = expected(row, looser, [0])
    ties = {round(x, 4) for x, p in zip(_penalized(row, penalty), support, strict=True) if p}
    for token in draw(row, [params] * 50, [0]):
        assert support[token] > 0 or round(_penalized(row, penalty)[token], 4) in ties


def _penalized(row: Tensor, penalty: float) -> list[float]:
    first = row[0].item()
    return [first * penalty if first < 0 else first / penalty, *row[1:].tolist()]


def test_of_equal_tokens_top_p_keeps_just_as_many_as_it_takes():
    params = [SamplingParams(temperature=1.0, top_p=0.5, seed=seed) for seed in range(200)]
    assert len(set(draw(torch.zeros(4), params, [0]))) == 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-38, 1e-300])
def test_a_temperature_near_zero_is_greedy_and_nothing_overflows(temperature: float):
    row = torch.tensor([30.0, -30.0, 31.0, 0.0])
    assert set(draw(row, [SamplingParams(temperature=temperature)] * 50, [0])) == {2}


def test_a_token_that_the_model_forbids_is_never_drawn():
    row = ROW.clone()
    row[2] = -torch.inf
    assert 2 not in draw(row, [SamplingParams(temperature=3.0, seed=seed) for seed in range(1000)], [0])


def test_the_repetition_penalty_also_holds_for_greedy_rows():
    row = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    assert sample(row.clone(), [Sequence([0], SamplingParams())])[0].token == 0
    assert sample(row.clone(), [Sequence([0], SamplingParams(repetition_penalty=1.2))])[0].token == 1
    assert sample(row[:, 2:].clone(), [Sequence([0], SamplingParams(repetition_penalty=1.2))])[0].token == 1


# --- company ---------------------------------------------------------------------------------------------------------


def test_a_seeded_row_draws_the_same_tokens_beside_any_others():
    torch.manual_seed(0)
    rows = torch.randn(9, 300)
    kinds = [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.5, "temperature": 2.0}]
    for own in kinds:
        mine = SamplingParams(**{"temperature": 1.0, **own}, seed=11)

        def draws(company: list[SamplingParams], at: int, mine: SamplingParams = mine) -> list[int]:
            sequences = [Sequence([1], p) for p in company]
            sequences.insert(at, Sequence([1], mine))
            block = rows[1 : len(company) + 1]
            logits = torch.cat([block[:at], rows[:1], block[at:]])
            found = []
            for _ in range(20):
                found.append(sample(logits.clone(), sequences)[at].token)
                for sequence in sequences:
                    sequence.tokens.append(1)
            return found

        alone = draws([], 0)
        assert len(set(alone)) > 1
        for other in kinds:
            neighbour = SamplingParams(**{"temperature": 0.8, **other}, seed=5)
            assert draws([neighbour], 0) == alone, (own, other)
            assert draws([neighbour, SamplingParams(), neighbour], 2) == alone, (own, other)


def test_greedy_rows_take_the_best_token_whatever_their_neighbours_draw():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    params = [SamplingParams(temperature=t, top_k=k) for t, k in ((0, 0), (1, 0), (0, 9), (2, 3), (0, 0), (1, 1))]
    tokens = [s.token for s in sample(logits.clone(), [Sequence([1], p) for p in params])]
    best = logits.argmax(-1).tolist()
    assert [tokens[i] for i in (0, 2, 4, 5)] == [best[i] for i in (0, 2, 4, 5)]


def test_different_seeds_and_no_seed_draw_differently():
    flat = torch.zeros(1000)
    assert len(set(draw(flat, [SamplingParams(temperature=1.0, seed=seed) for seed in range(20)], [0]))) > 15
    assert len(set(draw(flat, [SamplingParams(temperature=1.0)] * 20, [0]))) > 15
    assert len(set(draw(flat, [SamplingParams(temperature=1.0, seed=4)] * 20, [0]))) == 1


@pytest.mark.parametrize("seed", [0, (1 << 64) - 1])
def test_the_least_and_the_greatest_seed_are_seeds(seed: int):
    assert len(set(draw(torch.zeros(1000), [SamplingParams(temperature=1.0, seed=seed)] * 5, [0]))) == 1


def test_a_seeded_request_gives_the_same_text_alone_in_company_in_chunks_and_preempted(
    llama: BoundModel,
):
    prompt = list(range(1, 31))

    def request() -> Sequence:
        return Sequence(prompt, SamplingParams(max_tokens=30, temperature=1.2, top_p=0.95, seed=42))

    def company() -> list[Sequence]:
        kinds = ({}, {"top_k": 4}, {"temperature": 0.0}, {"min_p": 0.1, "repetition_penalty": 1.2})
        return [
            Sequence([i + 1] * (7 + 6 * i), SamplingParams(**{"max_tokens": 25, "temperature": 1.0, **kind}))
            for i, kind in enumerate(kinds)
        ]

    texts, preemptions = [], 0
    for how, neighbours in (
        ({}, []),
        ({}, company()),
        ({"budget": 9, "batch": 3}, company()),
        ({"blocks": 18}, company()),
    ):
        mine = request()
        one = engine(llama, block_size=4, **how)
        for sequence in [*neighbours[:2], mine, *neighbours[2:]]:
            one.add(sequence)
        drain(one)
        texts.append(mine.output)
        preemptions += mine.preemptions
    assert preemptions
    assert len(set(texts[0])) > 5
    assert all(text == texts[0] for text in texts)


def test_the_noise_is_a_function_of_seed_position_and_token_that_stays_as_it_is():
    """Words of SplitMix64 computed with Python's whole numbers: a seed that a user wrote down keeps its text."""
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mixed(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    for seed in (0, 7, (1 << 64) - 1):
        stream = mixed(mixed(seed) + 2 & mask)  # the sequence has two tokens
        uniform = [(mixed(stream + golden * (token + 1) & mask) >> 1) / 2**63 for token in range(500)]
        race = [-math.log1p(-u) for u in uniform]
        row = torch.randn(500, generator=torch.Generator().manual_seed(1))
        winner = max(range(500), key=lambda token, race=race, row=row: math.exp(row[token]) / race[token])
        assert draw(row, [SamplingParams(temperature=1.0, seed=seed)], [1, 2]) == [winner]


def test_a_token_drawn_ahead_is_the_one_drawn_in_its_turn():
    params = SamplingParams(temperature=1.0, seed=5)
    rows = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    for row in rows:
        ahead = choose(row[None].clone(), [Sequence([1, 2], params)], ahead=True).read()
        assert ahead == sample(row[None].clone(), [Sequence([1, 2, 3], params)])


# --- ties ------------------------------------------------------------------------------------------------------------


def tied(dtype: torch.dtype = torch.bfloat16, groups: int = 3, vocabulary: int = 5000) -> Tensor:
    """Logits [1, vocabulary] of a few values, so that each belongs to many tokens, shuffled; −0 is there beside 0."""
    values = torch.arange(groups, dtype=dtype) - groups // 2
    row = values[torch.randint(groups, (1, vocabulary), generator=torch.Generator().manual_seed(groups))]
    return torch.where(row == 0, torch.zeros(()).copysign(0.5 - torch.arange(vocabulary) % 2), row).to(dtype)


def by_id(row: Tensor) -> list[int]:
    """Tokens from the best to the worst; of equal ones the lowest id first."""
    return sorted(range(row.shape[-1]), key=lambda token: (-row[0, token].item(), token))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 3, 40])
def test_of_equal_tokens_greedy_takes_the_lowest_id_and_log_probabilities_list_it_first(
    dtype: torch.dtype, groups: int
):
    row = tied(dtype, groups)
    (sampled,) = sample(row.clone(), [Sequence([0], SamplingParams(logprobs=MAX_LOGPROBS))])
    assert sampled.token == by_id(row)[0]
    assert list(sampled.top) == by_id(row)[:MAX_LOGPROBS]


@pytest.mark.parametrize("groups", [1, 3, 40])
@pytest.mark.parametrize("top_k", [1, 2, 50, 4999])
def test_of_equal_tokens_top_k_keeps_the_lowest_ids(groups: int, top_k: int):
    row = tied(groups=groups)
    params = [SamplingParams(temperature=50.0, top_k=top_k, seed=seed) for seed in range(60)]
    drawn = {s.token for s in sample(row.repeat(60, 1), [Sequence([0], p) for p in params])}
    assert drawn <= set(by_id(row)[:top_k])
    assert len(drawn) > min(top_k, 60) // 2


@pytest.mark.parametrize("top_p", [0.004, 0.5])
def test_of_equal_tokens_top_p_keeps_the_lowest_ids(top_p: float):
    row = torch.zeros(1, 1000)
    params = [SamplingParams(temperature=1.0, top_p=top_p, seed=seed) for seed in range(100)]
    drawn = {s.token for s in sample(row.repeat(100, 1), [Sequence([0], p) for p in params])}
    assert drawn <= set(range(int(1000 * top_p)))
    assert max(drawn) > 900 * top_p if top_p == 0.5 else drawn == {0, 1, 2, 3}


def test_a_row_of_ties_draws_the_same_token_beside_rows_that_are_cut_elsewhere():
    row = tied()
    for own in ({"top_k": 7}, {"top_p": 0.3}, {"top_k": 900, "top_p": 0.2, "min_p": 0.1}):
        mine = SamplingParams(temperature=1.5, seed=3, logprobs=4, **own)
        found = []
        for others in ([], [{"top_k": 3000}], [{"top_p": 0.5}, {}], [{"temperature": 0.0, "logprobs": 90}]):
            params = [mine, *(SamplingParams(**{"temperature": 1.0, **other}) for other in others)]
            found.append(sample(row.repeat(len(params), 1), [Sequence([1, 2], p) for p in params])[0])
        assert all(one == found[0] for one in found)


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own_log_softmax_before_penalty_temperature_and_cuts():
    torch.manual_seed(0)
    logits = 4 * torch.randn(4, 40)
    reference = logits.double().log_softmax(-1)
    params = [
        SamplingParams(logprobs=3),
        SamplingParams(temperature=2.0, top_k=2, repetition_penalty=1.5, logprobs=5, seed=0),
        SamplingParams(),
        SamplingParams(logprobs=0),
    ]
    results = sample(logits.clone(), [Sequence([1, 2, 3], p) for p in params])
    assert results[2] == Sampled(results[2].token)
    for i, n in ((0, 3), (1, 5), (3, 0)):
        assert results[i].logprob == pytest.approx(reference[i, results[i].token].item(), abs=1e-5)
        best = reference[i].topk(n)
        assert list(results[i].top) == best.indices.tolist()
        assert list(results[i].top.values()) == pytest.approx(best.values.tolist(), abs=1e-5)


def test_asking_for_more_logprobs_than_there_are_tokens_gives_all_of_them():
    (result,) = sample(ROW[None].clone(), [Sequence([0], SamplingParams(logprobs=MAX_LOGPROBS))])
    assert len(result.top) == VOCABULARY
    assert sum(math.exp(x) for x in result.top.values()) == pytest.approx(1)


def test_logprobs_of_a_whole_answer_are_those_of_one_forward_without_a_cache(pamphlet: Model, text_ids: list[int]):
    (sequence,) = run(engine(pamphlet.bound, budget=20, batch=1), [text_ids[:50]], 12, logprobs=2)
    (whole,) = run(engine(pamphlet.bound), [sequence.tokens[:-1]], 1, logprobs=2)
    assert [s.token for s in sequence.sampled] == sequence.output
    assert whole.sampled[0].token == sequence.output[-1]
    assert whole.sampled[0].logprob == pytest.approx(sequence.sampled[-1].logprob, abs=1e-4)
    assert all(s.logprob == max(s.top.values()) for s in sequence.sampled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_sampled_in_float32(dtype: torch.dtype):
    logits = (3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    (result,) = sample(logits, [Sequence([0], SamplingParams(logprobs=1))])
    assert result.logprob == pytest.approx(logits.double().log_softmax(-1).max().item(), abs=1e-5)


def test_logits_that_are_not_finite_give_no_token_but_the_reason_and_leave_the_other_rows_alone():
    rows = ROW.repeat(5, 1)
    rows[1, 3], rows[2, 3], rows[3] = torch.nan, torch.inf, -torch.inf
    rows[4, 3] = -torch.inf  # a model may forbid a token
    drawn = SamplingParams(temperature=1.0, top_k=5, logprobs=12, seed=1)
    for params in (SamplingParams(logprobs=12), drawn):
        good, *bad, masked = sample(rows.clone(), [Sequence([0], params) for _ in rows])
        assert [one.error for one in bad] == [bad[0].error] * 3
        assert "overflow" in bad[0].error
        assert "--dtype" in bad[0].error
        for one in (good, masked):
            assert one.error is None
            assert all(math.isfinite(p) for p in (one.logprob, *one.top.values()))
    assert masked.top[3] == -9999.0, "as in vLLM: JSON has no infinity"


def test_tokens_that_would_end_an_answer_cannot_come_before_min_tokens():
    best, second = ROW.topk(2).indices.tolist()
    for answered, token in ((0, second), (1, second), (2, best)):
        sequence = Sequence([0], SamplingParams(min_tokens=2), frozenset({best}))
        sequence.tokens += [1] * answered
        [one] = sample(ROW[None].clone(), [sequence])
        assert one.token == token


# --- what OpenAI's API adds ------------------------------------------------------------------------------------------


def after(output: list[int], **params: object) -> Sequence:
    """A sequence of one prompt token that has answered `output`."""
    sequence = Sequence([0], SamplingParams(**params))  # type: ignore[arg-type]
    sequence.tokens += output
    return sequence


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=8), st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_presence_and_frequency_penalties_are_openais_formula_over_the_answer(
    output: list[int], presence: float, frequency: float
):
    counts = Counter(output)
    logits = [float(x) - frequency * counts[i] - presence * (counts[i] > 0) for i, x in enumerate(ROW)]
    if sorted(logits)[-1] - sorted(logits)[-2] < 1e-5:
        return
    [one] = sample(ROW[None].clone(), [after(output, presence_penalty=presence, frequency_penalty=frequency)])
    assert one.token == max(range(VOCABULARY), key=logits.__getitem__)


def test_a_bias_is_added_to_its_tokens_and_log_probabilities_stay_the_models_own():
    biased, plain = sample(ROW.repeat(2, 1), [after([], logit_bias={5: 100.0}, logprobs=0), after([], logprobs=0)])
    assert (biased.token, plain.token) == (5, 2)
    assert biased.logprob == pytest.approx(ROW.log_softmax(-1)[5].item(), abs=1e-6)


class Evens:
    """A guide that allows even tokens and fails after `last` of them."""

    cut = False

    def __init__(self, last: int = 100):
        self.last, self.taken = last, list[int]()

    def restrict(self, row: Tensor, _: int) -> None:
        if len(self.taken) >= self.last:
            raise OctavoError("no further")
        row[1::2] = -torch.inf

    def accept(self, token: int) -> None:
        self.taken.append(token)


def test_a_guide_decides_what_may_come_in_its_own_row_alone():
    pairs = []
    for seed in range(50):
        guided, free = (after([], temperature=5.0, seed=seed) for _ in range(2))
        guided.guide = Evens()
        pairs.append([one.token % 2 for one in sample(ROW.repeat(2, 1), [guided, free])])
    assert {odd for odd, _ in pairs} == {0}
    assert {odd for _, odd in pairs} == {0, 1}


def test_a_guide_that_fails_ends_its_own_answer_alone(llama: BoundModel):
    e = engine(llama, "fp32")
    guided, free = (Sequence([1, 2, 3], SamplingParams(max_tokens=10)) for _ in range(2))
    guided.guide = Evens(last=4)
    e.add(guided)
    e.add(free)
    drain(e)
    e.scheduler.check()
    assert (guided.finish_reason, len(guided.output)) == ("error", 4)
    assert (free.finish_reason, len(free.output)) == ("length", 10)


def test_penalties_follow_an_answer_as_it_grows():
    params = {"repetition_penalty": 1.7, "frequency_penalty": 0.5}
    growing = after([], **params)
    for n in range(1, len(SEEN) + 1):
        growing.tokens.append(SEEN[n - 1])
        rows = [ROW[None].clone() for _ in range(2)]
        sample(rows[0], [growing])
        sample(rows[1], [after(SEEN[:n], **params)])
        assert rows[0].equal(rows[1])
