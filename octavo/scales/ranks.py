"""Scales that are kept for each rank of tensor parallelism: rank r of n has the r-th n-th of the KV heads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from octavo.cache.plan import LayerShape
from octavo.errors import OctavoError


def over_heads(
    path: Path, ranks: Mapping[int, Mapping[int, Tensor]], shapes: Sequence[LayerShape] | None
) -> dict[int, Tensor]:
    """ranks[rank][layer] [1], of each layer as one tensor: [1, 1] for one rank, else [kv_heads, 1], each rank's value
    for its heads."""
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        raise OctavoError(
            f"{path}: has the scales of ranks {', '.join(map(str, sorted(ranks))) or 'no rank'}, not of all"
        )
    together: dict[int, Tensor] = {}
    for layer in sorted(set().union(*ranks.values())):
        missing = [rank for rank in ranks if layer not in ranks[rank]]
        if missing:
            raise OctavoError(f"{path}: the scale of layer {layer} is missing for rank {missing[0]}")
        values = torch.cat([ranks[rank][layer] for rank in sorted(ranks)])
        if len(values) > 1 and shapes is not None and layer < len(shapes):
            heads = shapes[layer].kv_heads
            if heads % len(values):
                raise OctavoError(f"{path}: {len(values)} ranks cannot share {heads} KV heads")
            values = values.repeat_interleave(heads // len(values))
        together[layer] = values[:, None]
    return together
