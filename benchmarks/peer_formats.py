"""Cache formats of other engines, simulated: what attention reads there, computed in float32.

K and V are rounded as the engine would store them, and read in float32: what is measured is the format alone.

    fp8 e4m3, scale 1      vLLM and SGLang, --kv-cache-dtype fp8 without calibrated scales
    q8_0, q4_0             llama.cpp, groups of 32 with an fp16 scale; rotated by a Hadamard matrix, as it does since
                           April 2026, or not
    KIVI-like              4 bits with an fp16 scale and minimum: K by channel over 32 tokens, V by token over 32
                           channels; the last 128 tokens stay as they are
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.cache.batch import Batch
from octavo.cache.store import KVCache
from octavo.measure.candidate import Candidate
from octavo.models.bound import BoundModel, Watch
from octavo.models.model import Model
from octavo.quant.codec import rotate
from octavo.quant.format import KVFormat

Rounded = Callable[[Tensor], Tensor]  # rows [tokens, kv_heads, dim] as a cache gives them back
GROUP = 32
RECENT = 128
BITS = {  # a value, scales and minima included
    "fp8 e4m3, scale 1": 8,
    "q8_0": 8 + 16 / GROUP,
    "q8_0, rotated": 8 + 16 / GROUP,
    "q4_0, rotated": 4 + 16 / GROUP,
    "KIVI-like, 4 bits, 128 recent": 4 + 32 / GROUP,
}


def candidates(model: Model) -> list[Candidate]:
    fp32 = KVFormat.parse("fp32")
    rounded = (_fp8, _q8_0, _rotated(_q8_0), _rotated(_q4_0))
    kivi = replace(model, bound=_RecentRaw(model.bound))  # type: ignore[arg-type]  # behaves as one
    *names, last = BITS
    return [
        *(Candidate(name, fp32, simulate=simulate) for name, simulate in zip(names, rounded, strict=True)),
        Candidate(last, fp32, model=kivi),
    ]


class _RecentRaw:
    """A bound model whose queries read the last RECENT rows as they are and all rows before them as KIVI rounds them.

    It brings its own attention: what a query reads of a row depends on how far away it is.
    """

    def __init__(self, bound: BoundModel):
        self.bound = bound
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # K and V of the text so far, by layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bound, name)

    def step(self, cache: KVCache, batch: Batch, every: bool = False, _: Watch | None = None) -> Tensor:
        if batch.positions[0] == 0:
            self.kept.clear()
        return self.bound.step(cache, batch, every, lambda layer, q, k, v: (k, v, self.attend(layer, q, k, v)))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.kept:
            k, v = (torch.cat(both) for both in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = k, v
        spec = self.bound.layers[layer]
        if spec.window is not None or spec.softcap is not None or spec.sinks is not None:
            raise NotImplementedError("KIVI is simulated for plain causal attention only")
        group = q.shape[1] // k.shape[1]
        raw_k, rounded_k, raw_v, rounded_v = (
            x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, _by_channel(k), v, _by_token(v))
        )
        key = torch.arange(len(k))
        query = key[-len(q) :, None]
        recent = key > query - RECENT
        q = q.transpose(0, 1) * spec.scale
        scores = torch.where(recent, q @ raw_k.mT, q @ rounded_k.mT)
        weights = scores.masked_fill(key > query, -torch.inf).softmax(-1)
        out = weights.masked_fill(~recent, 0) @ raw_v + weights.masked_fill(recent, 0) @ rounded_v
        return out.transpose(0, 1)


def _fp8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def _rotated(rounded: Rounded) -> Rounded:
    return lambda x: rotate(rounded(rotate(x)))


def _q8_0(x: Tensor) -> Tensor:
    """d = max|x|/127 in fp16, codes round(x/d)."""
    groups = x.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / scale.clamp(min=1e-12)).round()
    return (codes * _half(scale)).flatten(-2)


def _q4_0(x: Tensor) -> Tensor:
    """d = (the value of largest magnitude)/−8 in fp16, codes floor(x/d + 8.5) of 0…15."""
    groups = x.unflatten(-1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0, 1 / scale)
    codes = (groups * inverse + 8.5).floor().clamp(0, 15)
    return ((codes - 8) * _half(scale)).flatten(-2)


def _by_token(x: Tensor) -> Tensor:
    """Four bits between minimum and maximum of 32 neighbouring channels."""
    return _four_bits(x.unflatten(-1, (-1, GROUP)), -1).flatten(-2)


def _by_channel(x: Tensor) -> Tensor:
    """Four bits between minimum and maximum of a channel over 32 tokens; an unfinished group is still as it was."""
    whole = len(x) // GROUP * GROUP
    return torch.cat([_four_bits(x[:whole].unflatten(0, (-1, GROUP)), 1).flatten(0, 1), x[whole:]])


def _four_bits(groups: Tensor, dim: int) -> Tensor:
    low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12)
    return ((groups - low) / scale).round() * _half(scale) + _half(low)


def _half(x: Tensor) -> Tensor:
    return x.half().float()
