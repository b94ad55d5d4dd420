"""How the codes are read. `attend` is the one dispatcher: write the new codes, then attend to what is stored.

Write, then read: every query, its own chunk's included, attends to stored codes, so what a later query reads for a
token depends on that token's prefix alone and never on how the work was cut into steps.

A backend is chosen when a cache is made, by `backend_for`; its layout marks the cache as its own.
"""

import os
from collections.abc import Sequence

from torch import Tensor

from octavo.attention import cpu, cuda, reference
from octavo.attention.backend import AttentionSpec, Backend
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerPlan
from octavo.cache.store import LayerCache
from octavo.errors import OctavoError, warn_once

__all__ = ["AttentionSpec", "Backend", "attend", "backend_for", "backend_of"]

BACKENDS = {backend.name: backend for backend in (reference.BACKEND, cpu.BACKEND, cuda.BACKEND)}
BY_ORDER = {backend.layout.order: backend for backend in BACKENDS.values()}


def backend_for(plans: Sequence[LayerPlan]) -> Backend:
    """The fastest backend that can read a cache of these layers here.

    `OCTAVO_ATTENTION=reference`, `native` or `triton` forces one; raises OctavoError if that cannot be had.
    """
    wanted = os.environ.get("OCTAVO_ATTENTION") or None
    if wanted is not None and wanted not in BACKENDS:
        raise OctavoError(f"OCTAVO_ATTENTION is {wanted!r}; it must be reference, native or triton")
    on_gpu = any(plan.shape.device.type == "cuda" for plan in plans)
    backend = BACKENDS[wanted or ("triton" if on_gpu else "native")]
    refused = next(filter(None, map(backend.refuses, plans)), None)
    if refused is None:
        return backend
    if wanted is not None:
        raise OctavoError(f"OCTAVO_ATTENTION={wanted} cannot be had: {refused}")
    warn_once(f"attention runs on plain torch, which is slower: {refused}")
    return reference.BACKEND


def backend_of(layout: Layout) -> Backend:
    """The backend whose caches have that layout."""
    return BY_ORDER[layout.order]


def attend(spec: AttentionSpec, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Attention of q [T, heads, k_dim] over the cache, which first takes k [T, kv_heads, k_dim] and v [T, kv_heads,
    v_dim]; returns [T, heads, v_dim] in q's dtype. Scores, softmax and sums are float32."""
    return backend_of(cache.layout).attend(spec, cache, q, k, v, batch.on(q.device))
