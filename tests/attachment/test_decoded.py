"""`DecodedCache`: codes for models that the hook does not reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from octavo.attachment import DecodedCache
from octavo.errors import OctavoError, Unsupported
from tests.engine.test_transformers import with_own_head
from tests.models import zoo


def answer(hf: PreTrainedModel, ids: Tensor, cache: DynamicCache, **options: object) -> list[list[int]]:
    hf.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0} | options
    return hf.generate(ids, past_key_values=cache, **options)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["bloom", "gptj", "qwen3_next", "lfm2", "gemma2"])
def test_a_model_that_cannot_be_attached_answers_as_with_its_own_cache(name: str):
    """Models without the attention interface, with recurrent states, and with windows; rows kept as they are."""
    hf = with_own_head(zoo.build(name))
    ids = torch.randint(3, 96, (2, 70), generator=torch.Generator().manual_seed(7))
    expected = answer(hf, ids, DynamicCache(config=hf.config))
    cache = DecodedCache(hf.config, kv="fp32")
    assert answer(hf, ids, cache) == expected
    assert cache.nbytes > 0


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 5}], ids=["beams", "guessing"])
def test_beams_and_assisted_decoding(options: dict[str, int]):
    hf = with_own_head(zoo.build("gptj"))
    ids = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(7)).repeat(1, 3)
    expected = answer(hf, ids, DynamicCache(config=hf.config), **options)
    assert answer(hf, ids, DecodedCache(hf.config, kv="fp32"), **options) == expected


@pytest.mark.parametrize("kv", ["kv8", "int8-token"])
def test_codes_are_near_what_was_stored_and_half_as_large(kv: str):
    """With edges the first page and the own span are exact; after a crop that goes on."""
    cache = DecodedCache(zoo.build("llama").config, kv=kv)
    k, v = torch.randn(2, 3, 2, 200, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache.update(k[:, :, :150], v[:, :, :150], 0)
    assert torch.equal(cache.update(k[:, :, 150:170], v[:, :, 150:170], 0)[0][:, :, 150:], k[:, :, 150:170])
    cache.crop(-15)
    assert cache.get_seq_length() == 155
    read, _ = cache.update(k[:, :, 155:156], v[:, :, 155:156], 0)
    error = (read - k[:, :, :156]).float().norm(dim=-1) / k[:, :, :156].float().norm(dim=-1)
    exact = (error == 0).all(0).all(0)
    assert error.max() < 0.02
    assert exact[155:].all()
    if kv == "kv8":
        assert exact[:64].all()
        assert exact[128:].all()
    assert not exact[64:128].any()
    raw = 2 * 3 * 2 * 156 * 32 * 2
    assert cache.nbytes == raw * 33 // 64 + (2 * 3 * 2 * (64 + 28) * 32 * 2 if kv == "kv8" else 0)


def test_what_cannot_be_coded_is_refused():
    llama = zoo.build("llama").config
    with pytest.raises(OctavoError, match=r"int8 needs a calibration.*use kv8"):
        DecodedCache(llama, kv="int8")
    with pytest.raises(Unsupported, match="mamba2 has no layer of full attention"):
        DecodedCache(zoo.build("mamba2").config)
