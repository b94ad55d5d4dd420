"""The choice is the best one within the bytes, and the bytes are those that a cache takes."""

from __future__ import annotations

import random
from itertools import product

import pytest

from octavo.cache.size import CacheSize
from octavo.errors import OctavoError
from octavo.measure.tune.choice import choose, formats_of, token_budget, token_room
from octavo.measure.tune.sensitivity import CacheSide
from octavo.models.bind import BoundModel
from octavo.quant.format import CODECS, Codec

FOUR, EIGHT, RAW = CODECS["int4-token"], CODECS["int8-token"], CODECS["bf16"]


def part(layer: int, side: str, heads: int, dim: int, kl: float) -> CacheSide:
    nbytes = {codec: heads * codec.row_bytes(dim) for codec in (FOUR, EIGHT, RAW)}
    return CacheSide(layer, side, heads * dim, nbytes, {FOUR: kl, EIGHT: kl / 200, RAW: 0.0})  # type: ignore[arg-type]


def random_parts(seed: int) -> list[CacheSide]:
    """Of four layers, some with other heads than the rest."""
    rng = random.Random(seed)
    return [
        part(layer, side, rng.choice([2, 3]), rng.choice([64, 80]), rng.lognormvariate(-9, 1.5))
        for layer in range(4)
        for side in "kv"
    ]


def total(parts: list[CacheSide], codecs: list[Codec] | tuple[Codec, ...]) -> tuple[int, float]:
    pairs = list(zip(parts, codecs, strict=True))
    return sum(p.nbytes[codec] for p, codec in pairs), sum(p.kl[codec] for p, codec in pairs)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_of_as_many_bytes_loses_less(seed: int) -> None:
    """Against all of them."""
    parts = random_parts(seed)
    every = [total(parts, codecs) for codecs in product((FOUR, EIGHT, RAW), repeat=len(parts))]
    for share in (0.0, 0.1, 0.35, 0.5, 0.8, 1.0):
        least, most = min(every)[0], max(every)[0]
        budget = least + int(share * (most - least))
        size, loss = total(parts, choose(parts, budget))
        assert size <= budget
        assert loss == pytest.approx(min(kl for bytes_, kl in every if bytes_ <= budget))


@pytest.mark.parametrize("bits", [3, float("nan")])
def test_a_size_below_4_bits_is_refused_with_the_least_there_is(llama: BoundModel, bits: float) -> None:
    with pytest.raises(OctavoError, match=r"bits a value are too few: .* it is 5\.000"):
        token_budget(llama, bits)


def test_so_many_sessions_fit_into_the_memory_that_they_were_chosen_for(llama: BoundModel) -> None:
    parts = [part(layer, side, 2, 8, 1e-3 * (layer + 1)) for layer in range(2) for side in "kv"]
    most = CacheSize.of(llama.shapes, formats_of(llama, parts, [EIGHT] * 4))
    least = CacheSize.of(llama.shapes, formats_of(llama, parts, [FOUR] * 4))
    memory = (most.cache(3 * 4, 3) + least.cache(3 * 4, 3)) // 2
    chosen = formats_of(llama, parts, choose(parts, token_room(llama, memory, 3, 200)))
    assert CacheSize.of(llama.shapes, chosen).cache(3 * 4, 3) <= memory
    assert {format.k.bits for format in chosen} == {4, 8}
    with pytest.raises(OctavoError, match=r"3 sessions of 200 tokens take .* more than --memory"):
        token_room(llama, least.cache(3 * 4, 3) - 1, 3, 200)
