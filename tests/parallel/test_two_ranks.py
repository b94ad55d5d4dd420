"""A tiny model with grouped heads on two ranks answers as on one. The ranks are started once for the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError, Unsupported
from octavo.llm import LLM
from octavo.models.model import Model
from octavo.parallel.heads import Share
from octavo.plain_sessions import export_session, import_session
from octavo.quant.calibration import Calibration
from tests.conftest import observe, slow
from tests.parallel.models import FORMATS, alone, assert_same_answers, divided, tiny


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return alone(tiny(tmp_path_factory.mktemp("gqa"), 2))


@pytest.fixture(scope="module")
def two(one: Model) -> Iterator[Model]:
    with divided(one.path) as model:
        yield model


@pytest.fixture(scope="module")
def calibration(one: Model) -> Calibration:
    return observe(one.bound, one.bound.random_tokens(200), one.fingerprint)


@pytest.mark.parametrize("kv", ["fp32", "kv8", "kv4", *slow(*sorted({*FORMATS} - {"fp32", "kv8", "kv4"}))])
def test_two_ranks_answer_as_one_with_chunks_hits_and_preemptions(
    one: Model, two: Model, calibration: Calibration, kv: str
):
    """To the last bit of their log-probabilities."""
    assert_same_answers(one, two, calibration, kv, one.bound.random_tokens(1200))


def test_each_rank_holds_half_of_weights_and_cache(one: Model, two: Model):
    """By the tensors of rank 0."""
    assert [shape.kv_heads for shape in two.bound.shapes] == [1, 1]
    assert two.bound.whole == one.bound.shapes
    sizes = [sum(parameter.nbytes for parameter in model.bound.hf.parameters()) for model in (one, two)]
    assert sizes[1] < 0.6 * sizes[0]
    caches = [LLM(model, "int8-token", session_len=128, max_batch_size=2).cache.nbytes for model in (one, two)]
    assert 2 * caches[1] == caches[0]


def test_a_text_is_scored_as_on_one_rank(one: Model, two: Model):
    """Reading runs on all ranks."""
    tokens = one.bound.random_tokens(100)
    found, expected = (torch.cat(list(LLM(model, "int8-token").reading.logits(tokens))) for model in (two, one))
    assert torch.equal(found, expected)


def test_shares_are_found_by_what_the_ranks_compute():
    """Divided, held by two ranks each, and held by all."""
    a, b, c, d = torch.randn(4, 3, 1, 8)
    assert Share.of(torch.stack([a, b, c, d])) == Share((0, 1, 2, 3), 1, 4)
    assert Share.of(torch.stack([a, a])) == Share((0, 0), 1, 1)
    shared = Share.of(torch.stack([a, a, b, b]))
    assert shared == Share((0, 0, 1, 1), 1, 2)
    assert shared.givers == [0, 2]


def test_what_is_observed_inside_a_divided_model_is_refused(two: Model):
    with pytest.raises(Unsupported, match="octavo calibrate"):
        observe(two.bound, two.bound.random_tokens(8), "")


@pytest.mark.usefixtures("two")
def test_a_second_divided_model_in_a_process_is_refused(one: Model):
    with pytest.raises(OctavoError, match="one divided model"):
        LLM(one.path, tensor_parallel_size=2)


@pytest.mark.parametrize("kv", ["int8-token", "kv8"])
def test_a_session_saved_by_two_ranks_is_read_by_one_and_the_reverse(one: Model, two: Model, kv: str, tmp_path: Path):
    """A file has all heads: what is restored is found by the next prompt, and the answer is that of an undivided model
    that was never saved."""
    tokens = one.bound.random_tokens(200)
    llms = [LLM(model, kv, session_len=512, max_batch_size=2) for model in (one, two)]
    expected = llms[0].generate([tokens], SamplingParams(max_tokens=8))[0]
    for number, (writer, reader) in enumerate([(1, 0), (0, 1)]):
        file = tmp_path / f"{number}"
        assert llms[writer].save(file, tokens) == 192
        fresh = LLM((one, two)[reader], kv, session_len=512, max_batch_size=2)
        assert fresh.restore(file).cached_tokens == 192
        answer = fresh.generate([tokens], SamplingParams(max_tokens=8))[0]
        assert answer.cached_tokens == 192
        assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize("kv", ["int8", "kv8"])
def test_plain_rows_and_counts_of_a_divided_model_are_of_all_heads(
    one: Model, two: Model, calibration: Calibration, kv: str, tmp_path: Path
):
    """Plain files of one rank and of two have the same rows to the last bit, and what two ranks make of one, one rank
    exports again so. Of values outside a narrow range both count as many."""
    tokens, narrow = one.bound.random_tokens(200), {"calibration": calibration, "headroom": 0.5} if kv == "int8" else {}
    llms = [LLM(model, kv, session_len=512, max_batch_size=2, **narrow) for model in (one, two)]
    plain = [tmp_path / "one.plain", tmp_path / "two.plain", tmp_path / "again.plain"]
    saved = tmp_path / "saved"
    for llm, file in zip(llms, plain, strict=False):
        llm.save(saved, tokens)
        assert export_session(llm, saved, file) == 192
    assert import_session(llms[1], plain[1], saved) == 192
    export_session(llms[0], saved, plain[2])
    first, *others = map(load_file, plain)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
    alone, divided = (llm.cache.counts() for llm in llms)
    assert torch.equal(alone, divided)
    assert alone[..., 1].min() > 0
    assert alone[..., 0].any() == (kv == "int8")
