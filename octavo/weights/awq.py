"""AWQ: 4-bit weights whose groups are ranged by what the activations make of them.

J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv 2306.00978,
section 3.2). Channels that carry large activations are scaled up before rounding, by s = mean|x|^α, and their inputs
down by as much; α is searched on a grid for the least error of the layers' outputs. Then each group's range is shrunk
as far as that lowers the error again. Pure functions of tensors, float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.weights.layouts import Int4Weight

TOP = 15  # the highest of 16 codes
LEAST_MEAN = 1e-4  # a channel that is never active does not drive its scale to 0
SHRINKS = [1 - i / 20 for i in range(10)]  # of a group's range, best first if equal
COARSE = (1.0, 0.85, 0.7)  # the same while scales are searched
AT_A_TIME = 1 << 24  # values of a weight whose clipping is searched together
TINY = 1e-30  # the output of a dead layer, which nothing is lost of, for errors to be relative to


@dataclass(frozen=True)
class Search:
    """How finely scales are searched."""

    steps: int = 20  # of α in [0, 1): 0 is no scaling
    outputs: int = 1024  # of a layer that are looked at: what is sought are input channels


def round_to_nearest(weight: Tensor, group_size: int, shrink: Tensor | float = 1.0) -> Int4Weight:
    """`weight` [out, in] in groups of a row: 16 codes for the range from the lowest to the highest value and 0, clipped
    to `shrink` times the largest magnitude: a number, or [out, in/group_size]. Scales are float16, as in checkpoints.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    scales, zeros = _range(groups, shrink)
    codes = _codes(groups, scales, zeros)
    return Int4Weight(codes.flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales.half())


def _range(groups: Tensor, shrink: Tensor | float) -> tuple[Tensor, Tensor]:
    """Scales, that float16 has, and zeros of `groups` [out, groups, group_size]: each [out, groups]."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    limit = torch.maximum(-low, high) * shrink
    low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    scales = ((high - low) / TOP).clamp(min=2.0**-24).half().float()  # float16's least; a group of zeros has it
    return scales, (-low / scales).round().clamp(0, TOP)


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (groups / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, TOP)


def search_scale(
    weights: Sequence[Tensor], rows: Tensor, mean: Tensor, group_size: int, search: Search = Search()
) -> tuple[Tensor, float]:
    """The scale [in] of the input channels that `weights` [out, in] share, and its α. `rows` [n, in] are inputs, `mean`
    [in] the mean of |x| over many more.

    What counts is the error that clipping leaves, since clipping follows: what it mends is no reason for a scale. That
    of a layer is relative to its own output, so that no layer outweighs the others.
    """
    mean = mean.float().clamp(min=LEAST_MEAN)
    products = _products(rows, group_size)
    weights = [weight[:: -(-len(weight) // search.outputs)] for weight in weights]
    outputs = [max((rows @ weight.T).square().sum().item(), TINY) for weight in weights]
    best, least = (torch.ones_like(mean), 0.0), torch.inf
    for step in range(search.steps):
        alpha = step / search.steps
        scale = mean**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        parts = scale.unflatten(0, (-1, group_size))
        scaled = products / (parts[:, :, None] * parts[:, None, :])
        error = 0.0
        for weight, output in zip(weights, outputs, strict=True):
            errors = [_errors(weight * scale, scaled, group_size, shrink) for shrink in COARSE]
            error += torch.stack(errors).amin(0).sum().item() / output
        if error < least:
            best, least = (scale, alpha), error
    return best


def search_shrink(weight: Tensor, rows: Tensor, group_size: int) -> Tensor:
    """How far to shrink the range of each group of `weight` [out, in] for the least error of its part of the output on
    `rows` [n, in]: [out, in/group_size]."""
    products = _products(rows, group_size)
    found = []
    for some in weight.split(max(1, AT_A_TIME // weight.shape[1])):
        errors = torch.stack([_errors(some, products, group_size, shrink) for shrink in SHRINKS])
        found.append(torch.tensor(SHRINKS, device=weight.device)[errors.argmin(0)])
    return torch.cat(found)


def _products(rows: Tensor, group_size: int) -> Tensor:
    """Sums over `rows` [n, in] of the products of a group's channels: [in/group_size, group_size, group_size]."""
    parts = rows.unflatten(1, (-1, group_size)).transpose(0, 1)
    return parts.transpose(1, 2) @ parts


def _errors(weight: Tensor, products: Tensor, group_size: int, shrink: float) -> Tensor:
    """Squared errors [out, in/group_size] of each group's part of the output, summed over the rows in `products`: off
    by e, the weights of a group cost e·G·eᵀ."""
    groups = weight.unflatten(1, (-1, group_size))
    scales, zeros = _range(groups, shrink)
    off = _codes(groups, scales, zeros).sub_(zeros[..., None]).mul_(scales[..., None]).sub_(groups)
    off = off.transpose(0, 1)  # [groups, out, group_size]
    return ((off @ products) * off).sum(-1).T
