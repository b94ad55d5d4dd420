"""Which codec each layer's K and V get: the least loss within so many bytes, if losses add up.

They do nearly: each is small, they come from independent rounding, and the divergence is quadratic in their sum. With
that the choice is a knapsack, and dynamic programming over its bytes finds the best one.
"""

import math
from collections.abc import Sequence

import torch

from octavo.cache.size import CacheSize
from octavo.engine.scheduler import CHUNK_TOKENS
from octavo.errors import OctavoError
from octavo.measure.tune.sensitivity import CacheSide
from octavo.models.bind import BoundModel
from octavo.quant.format import SPAN, Codec, KVFormat, LayerFormats
from octavo.units import format_bytes


def choose(sides: Sequence[CacheSide], budget: int) -> list[Codec]:
    """A codec for each side: the least total KL of all choices of at most `budget` bytes a token, exactly. The budget
    is one of `token_budget` or `token_room`, which 4 bits everywhere do not exceed."""
    least = sum(min(one.nbytes.values()) for one in sides)
    assert least <= budget
    extra = [{codec: size - min(one.nbytes.values()) for codec, size in one.nbytes.items()} for one in sides]
    room = min(budget - least, sum(max(sizes.values()) for sizes in extra))
    unit = math.gcd(*(size for sizes in extra for size in sizes.values())) or 1
    best = torch.zeros(room // unit + 1, dtype=torch.float64)  # the least loss so far, with at most so many units
    chosen: list[torch.Tensor] = []  # for each side, which of its codecs that takes
    for one, sizes in zip(sides, extra, strict=True):
        losses = torch.full((len(sizes), len(best)), math.inf, dtype=torch.float64)
        for i, (codec, size) in enumerate(sizes.items()):
            taken = size // unit
            if taken < len(best):
                losses[i, taken:] = best[: len(best) - taken] + one.kl[codec]
        best, which = losses.min(0)
        chosen.append(which)
    left, found = len(best) - 1, []
    for sizes, which in zip(reversed(extra), reversed(chosen), strict=True):
        codec = list(sizes)[int(which[left])]
        found.append(codec)
        left -= sizes[codec] // unit
    return found[::-1]


def formats_of(bound: BoundModel, sides: Sequence[CacheSide], codecs: Sequence[Codec]) -> LayerFormats:
    """The layers' formats with these codecs for the sides. A layer that shares another's cache has its format."""
    chosen = {(one.layer, one.side): codec for one, codec in zip(sides, codecs, strict=True)}
    owners = (i if shape.shares is None else shape.shares for i, shape in enumerate(bound.shapes))
    pairs = [(chosen[owner, "k"], chosen[owner, "v"]) for owner in owners]
    return LayerFormats(tuple(KVFormat(k, v, 0 if k.is_raw and v.is_raw else SPAN) for k, v in pairs))


def token_budget(bound: BoundModel, bits: float) -> int:
    """Bytes of a token at so many bits a value, scales included. Raises OctavoError where 4 bits everywhere take
    more."""
    values = sum(shape.kv_heads * (shape.k_dim + shape.v_dim) for shape in bound.shapes if shape.shares is None)
    least = CacheSize.of(bound.shapes, KVFormat.parse("kv4")).token
    if not (budget := bits * values / 8) >= least:
        raise OctavoError(
            f"{bits:g} bits a value are too few: with 4 bits everywhere and a scale for each row it is "
            f"{8 * least / values:.3f}"
        )
    return int(budget)


def token_room(bound: BoundModel, memory: int, sessions: int, context: int) -> int:
    """Bytes that a token's codes may take where `sessions` of `context` tokens are to fit into `memory`, raw pages and
    whole blocks included."""
    size = CacheSize.of(bound.shapes, KVFormat.parse("kv4"), step=CHUNK_TOKENS, states=bound.states)
    fixed, blocks = size.cache(0, sessions), sessions * size.blocks(context)
    room = (memory - fixed) // (blocks * size.block_size)
    if room < size.token:
        raise OctavoError(
            f"{sessions} sessions of {context:,} tokens take {format_bytes(size.cache(blocks, sessions))} with 4 bits "
            f"everywhere, which is more than --memory {format_bytes(memory)}: fewer, shorter, or more memory"
        )
    return room
