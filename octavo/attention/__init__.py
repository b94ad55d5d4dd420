"""How the codes are read. `attend` is the one dispatcher: write the new codes, then attend to what is stored.

Write, then read: every query, its own chunk's included, attends to stored codes, so what a later query reads for a
token depends on that token's prefix alone and never on how the work was cut into steps.

Which implementation reads a cache is decided when the cache is made, by the layout that `layout_for` gives it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from torch import Tensor

from octavo.attention import cpu, cuda, reference
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.store import LayerCache, LayerShape
from octavo.errors import OctavoError


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention layer computes, as its dry trace showed it."""

    shape: LayerShape
    heads: int  # query heads
    scale: float  # scores are scale·q·k
    window: int | None = None  # a query sees this many last tokens, itself included
    softcap: float | None = None  # scores become softcap·tanh(score/softcap)
    sinks: Tensor | None = None  # [heads] a logit that takes weight and gives nothing (gpt-oss)


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def layout_for(shapes: Sequence[LayerShape]) -> Layout:
    """The layout of the fastest implementation that can read such a cache here.

    `OCTAVO_ATTENTION=reference`, `native` or `triton` forces one; raises OctavoError if that cannot be had.
    """
    wanted = os.environ.get("OCTAVO_ATTENTION") or None
    if wanted not in (None, "reference", "native", "triton"):
        raise OctavoError(f"OCTAVO_ATTENTION is {wanted!r}; it must be reference, native or triton")
    if wanted == "reference":
        return Layout(order="rows")
    on_gpu = any(shape.device.type == "cuda" for shape in shapes) if wanted is None else wanted == "triton"
    kernels: ModuleType = cuda if on_gpu else cpu
    missing = kernels.unavailable()
    if missing is None:
        for shape in shapes:
            if shape.device.type not in kernels.devices():
                missing = f"the cache is on {shape.device}"
            elif not kernels.takes(shape.k_dim, shape.v_dim):
                missing = f"no kernel takes heads of {shape.k_dim} and {shape.v_dim}"
    if missing is None:
        return Layout(order="pages" if on_gpu else "tiles")
    if wanted is not None:
        raise OctavoError(f"OCTAVO_ATTENTION={wanted} cannot be had: {missing}")
    _say_once(f"attention runs on plain torch, which is slower: {missing}")
    return Layout(order="rows")


def capturable(layout: Layout) -> bool:
    """Whether what reads such a cache can be captured in a CUDA graph: it looks at no value of a step on the host."""
    return layout.order == "pages"


def attend(spec: AttentionSpec, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Attention of q [T, heads, k_dim] over the cache, which first takes k [T, kv_heads, k_dim] and v [T, kv_heads,
    v_dim]; returns [T, heads, v_dim] in q's dtype. Scores, softmax and sums are float32."""
    batch = batch.on(q.device)
    if cache.k.layout.order == "k-tiles":
        return cpu.attend(spec, cache, q, k, v, batch)
    if cache.k.layout.order == "k-pages":
        return cuda.attend(spec, cache, q, k, v, batch)
    if spec.shape.shares is None:
        cache.write(k, v, batch.slots)
    return reference.attend(spec, cache, q, batch)
