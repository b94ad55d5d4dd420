"""Attention on codes with Triton kernels: the counterpart of reference.py for NVIDIA GPUs.

A step is three launches a layer, and knows no phases: `write` encodes the new rows into their slots and folds the
queries, `scan` reads the cache, `combine` joins what `scan`'s programs have summed. A step of chunks and decodes scans
twice, once with small tiles split over the cache, once with large ones.

Triton is imported on first use: who has no GPU may have no Triton. With TRITON_INTERPRET=1 the kernels run on a CPU,
slowly; that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from octavo.attention.backend import AttentionSpec, Backend
from octavo.cache.batch import Batch
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerPlan
from octavo.cache.store import LayerCache

LARGEST = 256  # head_dim whose tiles fit the registers


@cache
def unavailable() -> str | None:
    """Why the kernels cannot be used here; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return None if torch.cuda.is_available() else "there is no GPU"


@cache
def too_old(device: torch.device) -> bool:
    """Whether it is a GPU before Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def refuses(plan: LayerPlan) -> str | None:
    """Why the kernels cannot read such a layer; they have every codec."""
    shape = plan.shape
    if (why := unavailable()) is not None:
        return why
    if shape.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the cache is on {shape.device}"
    if too_old(shape.device):
        return f"the GPU {shape.device} is older than Ampere"
    if max(shape.k_dim, shape.v_dim) > LARGEST:
        return f"no kernel takes heads of {shape.k_dim} and {shape.v_dim}"
    return None


def attend(spec: AttentionSpec, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """As `octavo.attention.attend`."""
    from octavo.attention.cuda import launch

    return launch.attend(spec, cache, q, k, v, batch)


BACKEND = Backend("triton", Layout(order="pages"), attend, refuses, capturable=True)
