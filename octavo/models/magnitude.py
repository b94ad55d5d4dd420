"""How large a model's K and V are: a power of two for each, where they lie outside what token scales can say.

A token format has a table of scales for rows whose largest value is between 2⁻⁶ and 2¹⁰ (quant/codec.py). With a
calibration every row is divided by its channels' spread first. Without one, most models' rows lie in the middle of the
table; those of others are divided by a power of two, which changes no bit but the exponent's.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.models.bind import BoundModel
from octavo.quant.codec import rotate

TOKENS = 32  # that are looked at
USUAL = (2.0**-4, 2.0**5)  # largest value of a typical row that needs no power of two
MOST = 2.0**8  # of any row
STEP = 4  # exponents are multiples of it, so that another device's rounding gives the same


def fit_table(bound: BoundModel, tokens: Sequence[int]) -> None:
    """Set the exponents of all layers by a forward over some tokens. A model without values keeps 0."""
    ids = torch.tensor(tokens[:TOKENS], device=bound.device)
    if ids.is_meta:
        return
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[layer] = bound.everywhere(_largest(k)), bound.everywhere(_largest(v))
        spec = bound.layers[layer]
        queries, keys, values = (x.float().transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=spec.scale, enable_gqa=True)
        return out[0].transpose(0, 1).to(q.dtype)

    rows = torch.arange(len(ids), device=bound.device)
    bound.forward(ids, rows, rows[-1:], attend)
    bound.layers = [
        replace(spec, shape=replace(spec.shape, exponents=(_exponent(seen[i][0]), _exponent(seen[i][1]))))
        for i, spec in enumerate(bound.layers)
    ]


def _largest(x: Tensor) -> Tensor:
    """Of each row and head, rotated as its codes are."""
    return rotate(x.float()).abs().amax(-1).flatten().cpu()


def _exponent(largest: Tensor) -> int:
    typical, most = largest.median().item(), largest.max().item()
    if not 0 < typical < math.inf or (USUAL[0] <= typical <= USUAL[1] and most <= MOST):
        return 0
    middle = STEP * round((math.log2(typical) - 1) / STEP)
    return max(middle, STEP * math.ceil(math.log2(most / MOST) / STEP))
