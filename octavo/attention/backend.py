"""What an implementation of attention is, as a value: reference, cpu and cuda are three of it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerPlan, LayerShape
from octavo.cache.store import LayerCache


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention layer computes, as its dry trace showed it."""

    shape: LayerShape
    heads: int  # query heads
    scale: float  # scores are scale·q·k
    window: int | None = None  # a query sees this many last tokens, itself included
    softcap: float | None = None  # scores become softcap·tanh(score/softcap)
    sinks: Tensor | None = None  # [heads] a logit that takes weight and gives nothing (gpt-oss)
    exact: bool = False  # one order of sums on every processor: a row's bits do not depend on its company


Attend = Callable[[AttentionSpec, LayerCache, Tensor, Tensor, Tensor, Batch], Tensor]
"""Write k [T, kv_heads, k_dim] and v [T, kv_heads, v_dim] into the cache, then attend with q [T, heads, k_dim]."""


@dataclass(frozen=True)
class Backend:
    """An implementation of attention, which reads caches of one layout."""

    name: str  # as OCTAVO_ATTENTION has it
    layout: Layout
    attend: Attend
    refuses: Callable[[LayerPlan], str | None]  # why it cannot read such a layer here; None if it can
    capturable: bool = False  # in a CUDA graph: it looks at no value of a step on the host
    recordable: bool = False  # on a tape (engine/tapes.py): nor does it, and native kernels tell who listens
