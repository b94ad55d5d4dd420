"""What a model is, as far as its cache is concerned: read from the bound model, and seen on its K and V.

Of keys it looks for a constant offset on a few channels, as Qwen2's key biases make it, and for channels that are much
wider than the others: both take the steps of a scale that the other channels would need.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.attention import AttentionSpec
from octavo.calibrate.positions import FARTHEST, shift_invariant
from octavo.engine.reading import Reading
from octavo.measure.speed.roofline import cache_bytes
from octavo.models.bind import UNLIMITED, BoundModel
from octavo.models.hook import NAME
from octavo.models.packed import parameters
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat, dtype_name

OFFSET = 20  # times its head's median spread, the mean of a channel; trained models without biases stay at 10
KEY_BIAS = re.compile(r"(^|\.)(k|key|k_proj|key_proj|k_linear|wk)\.bias$")


@dataclass(frozen=True)
class Group:
    """Layers of one geometry."""

    layers: list[int]
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool
    shared: bool  # read the cache of an earlier layer


@dataclass(frozen=True)
class Anatomy:
    """What the config and the dry trace say."""

    architecture: str
    parameters: int
    dtype: str
    layers: int
    groups: list[Group]
    context: int | None  # None: the model names no limit
    rope: str
    shift_invariant: bool | None  # None: the context is too short to tell
    token_bytes_16: int  # of the cache in 16 bits


@dataclass(frozen=True)
class Keys:
    """The keys of one layer before RoPE."""

    layer: int
    bias_norm: float | None  # of the bias parameter; None where there is none, or it is fused with others
    offset: float  # the largest mean of a channel over the median spread of its head's channels
    channels: int  # whose offset is above OFFSET

    @property
    def biased(self) -> bool:
        return self.channels > 0


@dataclass(frozen=True)
class Widths:
    """Ranges of the channels of one side of one layer, after RoPE, over the calibration's positions."""

    layer: int
    side: str
    widest: float
    median: float

    @property
    def ratio(self) -> float:
        return self.widest / self.median if self.median > 0 else 1.0


def examine(bound: BoundModel) -> Anatomy:
    config = bound.hf.config.get_text_config()
    far = min(bound.max_context, FARTHEST) - 32
    return Anatomy(
        architecture=config.model_type,
        parameters=parameters(bound.hf),
        dtype=dtype_name(bound.dtype),
        layers=len(bound.layers),
        groups=_groups(bound.layers),
        context=None if bound.max_context == UNLIMITED else bound.max_context,
        rope=_rope(getattr(config, "rope_parameters", None)),
        shift_invariant=shift_invariant(bound, far) if far > 0 else None,
        token_bytes_16=cache_bytes(bound, KVFormat.parse("bf16"), 1),
    )


def keys(bound: BoundModel, window: Sequence[int]) -> list[Keys]:
    """Of every layer with a cache of its own: the norm of its key bias and the offsets seen over `window`.

    Every token is put at position 0, where RoPE turns nothing: elsewhere it would turn a constant into a wave.
    """
    seen: dict[int, Tensor] = {}

    def observe(layer: int, _q: Tensor, k: Tensor, _v: Tensor) -> None:
        mean, spread = k.float().mean(0).abs(), k.float().std(0)  # [kv_heads, dim]
        seen[layer] = (mean / spread.median(-1, keepdim=True).values.clamp(min=1e-6)).cpu()

    Reading(bound).run(window, observe, torch.zeros(len(window), dtype=torch.int64))
    norms = _bias_norms(bound.hf)
    return [
        Keys(layer, norms.get(layer), offset.max().item(), int((offset > OFFSET).sum()))
        for layer, offset in sorted(seen.items())
        if bound.shapes[layer].shares is None
    ]


def widths(calibration: Calibration) -> list[Widths]:
    """Widest and median channel of K and V of every layer."""
    found = []
    for layer, sides in enumerate(calibration.layers):
        for side in ("k", "v"):
            width = (sides[side]["max"] - sides[side]["min"]).flatten()
            found.append(Widths(layer, side.upper(), width.max().item(), width.median().item()))
    return found


def _groups(layers: Sequence[AttentionSpec]) -> list[Group]:
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        shape = layer.shape
        geometry = (layer.heads, shape.kv_heads, shape.k_dim, shape.v_dim, layer.scale)
        extras = (layer.window, layer.softcap, layer.sinks is not None, shape.shares is not None)
        found.setdefault((*geometry, *extras), []).append(i)
    return [Group(indices, *key) for key, indices in found.items()]


def _rope(parameters: dict[str, Any] | None) -> str:
    """RoPE's kind in words; models that alternate have one for each type of layer."""
    if not parameters:
        return "none"
    if "rope_type" not in parameters:
        return "; ".join(f"{name}: {_rope(own)}" for name, own in parameters.items() if isinstance(own, dict))
    words = [str(parameters["rope_type"])]
    words += [f"{word} {parameters[key]:g}" for key, word in (("rope_theta", "base"), ("factor", "factor"))
              if parameters.get(key) is not None]  # fmt: skip
    share = parameters.get("partial_rotary_factor")
    return ", ".join(words) + (f", on {share:.0%} of each head" if share and share < 1 else "")


def _bias_norms(hf: nn.Module) -> dict[int, float]:
    """Norm of the bias of each layer's keys, where it is a parameter of its own."""
    found = {}
    for module in hf.modules():
        if (layer := vars(module).get(NAME)) is not None:
            norms = [bias.float().norm().item() for name, bias in module.named_parameters() if KEY_BIAS.search(name)]
            if norms:
                found[layer] = norms[0]
    return found
