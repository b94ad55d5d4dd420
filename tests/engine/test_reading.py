"""A text that is read is computed as the model itself computes it, whole or in chunks, alone or beside others."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from octavo.cache.store import KVCache
from octavo.engine import reading
from octavo.engine.reading import Reading
from octavo.models.bind import BoundModel, unbound
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat

TEXT = torch.randint(64, (100,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def truth(llama: BoundModel) -> Tensor:
    """Logits of TEXT by transformers' own attention."""
    with unbound(llama, "eager") as hf, torch.inference_mode():
        return hf(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0]


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_logits_are_the_model_s_own_however_the_text_is_cut(llama, truth, monkeypatch, rows):
    monkeypatch.setattr(reading, "LOGIT_ROWS", rows)
    parts = list(Reading(llama).logits(TEXT))
    assert max(map(len, parts)) == min(rows, len(TEXT))
    torch.testing.assert_close(torch.cat(parts), truth, atol=1e-4, rtol=1e-4)


def test_texts_that_share_steps_do_not_see_each_other(llama):
    texts = [TEXT[:40], TEXT[50:]]
    cuts = [[30, 10], [10, 0], [0, 40]]
    rows: list[list[Tensor]] = [[], []]
    for cut, logits in zip(cuts, Reading(llama).steps(texts, cuts), strict=True):
        for own, part in zip(rows, logits.split(cut), strict=True):
            own.append(part)
    for text, own in zip(texts, rows, strict=True):
        torch.testing.assert_close(torch.cat(own), torch.cat(list(Reading(llama).logits(text))), atol=1e-4, rtol=1e-4)


def test_an_observer_sees_every_row_once_and_in_order(llama, monkeypatch):
    def keys(text: list[int], start: int = 0) -> Tensor:
        seen: list[Tensor] = []
        Reading(llama).run(
            text, lambda layer, _q, k, _v: seen.append(k) if layer == 1 else None, torch.arange(len(text)) + start
        )
        return torch.cat(seen)

    whole = keys(TEXT)
    monkeypatch.setattr(reading, "CHUNK_TOKENS", 33)
    torch.testing.assert_close(keys(TEXT), whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(keys(TEXT, 50), whole, atol=1e-2), "a text's keys turn with its position"


def test_values_beyond_the_range_are_counted_over_all_texts(llama, llama_calibration: Calibration):
    narrow = Reading(llama, KVFormat.parse("int8"), llama_calibration.choosing(headroom=0.5))
    for _ in range(2):
        narrow.run(TEXT)
    values = sum(shape.kv_heads * (shape.k_dim + shape.v_dim) for shape in llama.shapes)
    assert narrow.written == 2 * len(TEXT) * values
    assert 0.001 < narrow.outside / narrow.written < 0.5
    wide = Reading(llama, KVFormat.parse("int8"), llama_calibration.choosing(headroom=4.0))
    wide.run(TEXT)
    assert wide.outside == 0


def test_what_k_and_v_go_through_first_is_what_is_read(llama, truth):
    nothing = torch.cat(list(Reading(llama, simulate=torch.zeros_like).logits(TEXT)))
    assert (nothing - truth).norm() > 0.1 * truth.norm()


def test_a_read_text_leaves_no_cache_behind(llama):
    def caches() -> int:
        gc.collect()
        return sum(type(thing) is KVCache for thing in gc.get_objects())

    before = caches()
    Reading(llama).run(TEXT)
    started = Reading(llama).logits(TEXT)
    next(started)
    assert caches() == before + 1
    started.close()
    assert caches() == before
