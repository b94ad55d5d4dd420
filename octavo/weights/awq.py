"""AWQ: 4-bit weights whose groups are ranged by what the activations make of them.

J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv 2306.00978,
section 3.2). Channels that carry large activations are scaled up before rounding, by s = mean|x|^α, and their inputs
down by as much; α is searched on a grid for the least error of the layers' outputs. Then each group's range is shrunk
as far as that lowers the error again. Pure functions of tensors, float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.weights.layouts import Int4Weight

TOP = 15  # the highest of 16 codes
STEPS = 20  # of α in [0, 1): 0 is no scaling
LEAST_MEAN = 1e-4  # a channel that is never active does not drive its scale to 0
SHRINKS = [1 - i / 20 for i in range(10)]  # of a group's range, best first if equal
TYPICAL = 0.85  # what is found for most groups
AT_A_TIME = 1 << 24  # values of a weight whose clipping is searched together


def round_to_nearest(weight: Tensor, group_size: int, shrink: Tensor | float = 1.0) -> Int4Weight:
    """`weight` [out, in] in groups of a row: codes of the range from its lowest to its highest value and 0, times
    `shrink`, a number or [out, in/group_size]. Scales are float16, as AWQ checkpoints keep them."""
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
    scales = ((high - low) / TOP).clamp(min=2.0**-24).half()  # float16's least; a group of zeros has it
    zeros = (-low / scales.float()).round().clamp(0, TOP)
    codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, TOP)
    return Int4Weight(codes.flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales)


def search_scale(
    weights: Sequence[Tensor], rows: Tensor, mean: Tensor, group_size: int
) -> tuple[Tensor, float]:
    """The scale [in] of the input channels that `weights` [out, in] share, and its α. `rows` [n, in] are inputs, `mean`
    [in] the mean of |x| over many more.

    The error of a layer is relative to its own output, so that no layer outweighs the others. Ranges are clipped about
    as they will be at the end: what clipping mends is no reason for a scale.
    """
    mean = mean.float().clamp(min=LEAST_MEAN)
    outputs = [rows @ weight.T for weight in weights]
    best, least = (torch.ones_like(mean), 0.0), torch.inf
    for step in range(STEPS):
        alpha = step / STEPS
        scale = mean**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight, output in zip(weights, outputs, strict=True):
            rounded = round_to_nearest(weight * scale, group_size, TYPICAL).dequantize()
            error += ((rows / scale @ rounded.T - output).square().mean() / output.square().mean()).item()
        if error < least:
            best, least = (scale, alpha), error
    return best


def search_shrink(weight: Tensor, rows: Tensor, group_size: int) -> Tensor:
    """How far to shrink the range of each group of `weight` [out, in] for the least error of its part of the output on
    `rows` [n, in]: [out, in/group_size].

    The error of a group whose weights are off by e is e·G·eᵀ, with G the rows' products of its channels.
    """
    parts = rows.unflatten(1, (-1, group_size)).transpose(0, 1)  # [groups, n, group]
    products = parts.transpose(1, 2) @ parts
    found = []
    for some in weight.split(max(1, AT_A_TIME // weight.shape[1])):
        errors = []
        for shrink in SHRINKS:
            off = round_to_nearest(some, group_size, shrink).dequantize() - some
            off = off.unflatten(1, (-1, group_size)).transpose(0, 1)  # [groups, out, group]
            errors.append(((off @ products) * off).sum(-1).T)
        found.append(torch.tensor(SHRINKS, device=weight.device)[torch.stack(errors).argmin(0)])
    return torch.cat(found)
