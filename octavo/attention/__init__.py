"""How the codes are read. `attend` is the one dispatcher: write the new codes, then attend to what is stored.

Write, then read: every query, its own chunk's included, attends to stored codes, so what a later query reads for a
token depends on that token's prefix alone and never on how the work was cut into steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.attention import reference
from octavo.cache.batch import Batch
from octavo.cache.store import LayerCache, LayerShape


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention layer computes, as its dry trace showed it."""

    shape: LayerShape
    heads: int  # query heads
    scale: float  # scores are scale·q·k
    window: int | None = None  # a query sees this many last tokens, itself included
    softcap: float | None = None  # scores become softcap·tanh(score/softcap)
    sinks: Tensor | None = None  # [heads] a logit that takes weight and gives nothing (gpt-oss)


def attend(spec: AttentionSpec, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Attention of q [T, heads, k_dim] over the cache, which first takes k [T, kv_heads, k_dim] and v [T, kv_heads,
    v_dim]; returns [T, heads, v_dim] in q's dtype. Scores, softmax and sums are float32."""
    batch = batch.on(q.device)
    if spec.shape.shares is None:
        cache.write(k, v, batch.slots)
    return reference.attend(spec, cache, q, batch)
