"""Bind a Hugging Face model to our attention: any architecture, one hook, or a clear refusal.

transformers sends every attention layer of a model through a function that can be registered. Ours finds, on the module
that calls it, which layer that is, and hands q, k and v to whatever `attend` the forward was given: the serving cache,
the observer of a calibration, a recorder. Nothing is taken from the model's config that the call itself can tell: a
one-token dry run records each layer's geometry, scale, window, soft cap and sinks.

What cannot be right is refused here, since it would be wrong in silence: layers that keep another state than K and V,
attention patterns that live only in a mask, keywords that change the scores, models that never reach the hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.attention import AttentionSpec
from octavo.cache.store import LayerShape
from octavo.errors import Unsupported

NAME = "octavo"
UNLIMITED = 1 << 30  # context of a model that names no limit
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Keywords of the attention call that cannot change what is computed here. Any other one that is set is refused.
HARMLESS = {
    "attention_mask", "cache_position", "dropout", "is_causal", "layer_idx", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "training", "use_cache",
}  # fmt: skip

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, heads, k_dim], k [T, kv_heads, k_dim], v [T, kv_heads, v_dim]) → [T, heads, v_dim]"""


@dataclass
class _Point:
    """Hung on an attention module: which layer it is, of which model."""

    model: BoundModel
    layer: int


class BoundModel:
    """A model whose attention goes through `attend`. Made by `bind`."""

    def __init__(self, hf: PreTrainedModel, max_context: int):
        self.hf = hf
        self.max_context = max_context
        self.layers: list[AttentionSpec] = []
        self.attend: Attend | _Trace | None = None

    @property
    def shapes(self) -> list[LayerShape]:
        return [layer.shape for layer in self.layers]

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go in and logits come out."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        return self.hf.config.get_text_config().vocab_size

    @torch.inference_mode()
    def forward(self, ids: Tensor, positions: Tensor, logits_at: Tensor, attend: Attend | _Trace) -> Tensor:
        """Packed rows: ids and positions [T], int64; float logits [n, vocabulary] of the rows `logits_at` [n]."""
        self.attend = attend
        try:
            logits = self.hf(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=logits_at
            ).logits[0]
        finally:
            self.attend = None
        return logits if len(logits) == len(logits_at) else logits[logits_at]  # a model that keeps every row's


def bind(hf: PreTrainedModel, context: int | None = None) -> BoundModel:
    """Bind a loaded model in place; raises `Unsupported` with the reason where the result could be wrong.

    `context` is the longest sequence to be served, the model's own limit by default: RoPE variants that change their
    frequencies with the length are pinned to it, so that a sequence's neighbours never change its answer.
    """
    config = hf.config.get_text_config()
    name = config.model_type
    if getattr(hf.config, "is_encoder_decoder", False):
        raise Unsupported(f"{name} is an encoder-decoder; Octavo serves decoder-only language models")
    strange = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if strange:
        raise Unsupported(f"{name} has layers of type {', '.join(sorted(strange))}, whose state is not a KV cache of rows")
    if not hf._can_set_attn_implementation():
        raise Unsupported(f"{name} does not send its attention through transformers' AttentionInterface")
    max_context = getattr(config, "max_position_embeddings", None) or UNLIMITED
    _pin_rope(hf, context or max_context)

    AttentionInterface.register(NAME, _attention)
    hf.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise Unsupported(f"{name} did not accept the attention function; it kept {config._attn_implementation!r}")
    bound = BoundModel(hf.eval(), max_context)
    with _Trace(bound) as trace:
        zero = torch.zeros(1, dtype=torch.int64, device=bound.device)
        bound.forward(zero, zero, zero, trace)
    expected = getattr(config, "num_hidden_layers", len(trace.specs))
    if len(trace.specs) != expected or not trace.specs:
        raise Unsupported(
            f"only {len(trace.specs)} of the {expected} layers of {name} reach the attention function; "
            "the others keep a state that is not a KV cache"
        )
    bound.layers = trace.specs
    return bound


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The registered function: q [1, heads, T, dim], k and v [1, kv_heads, T, dim] after RoPE, before any GQA repeat."""
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    point: _Point | None = getattr(module, NAME, None)
    if point is None:
        point = _Trace.adopt(module)
    attend = point.model.attend
    if isinstance(attend, _Trace):
        attend.record(module, q, k, v, attention_mask, kwargs)
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)[None], None  # one key takes all the weight
    if attend is None:
        raise RuntimeError("a bound model runs through BoundModel.forward")
    return attend(point.layer, q, k, v)[None], None


class _Trace:
    """Records the layers that a dry run reaches, in the order in which it reaches them."""

    active: _Trace | None = None

    def __init__(self, bound: BoundModel):
        self.bound = bound
        self.name = bound.hf.config.get_text_config().model_type
        self.specs: list[AttentionSpec] = []
        self.seen: list[tuple[Tensor, Tensor]] = []  # kept alive: identity tells a shared K/V from a new one

    def __enter__(self) -> _Trace:
        for module in self.bound.hf.modules():
            vars(module).pop(NAME, None)  # of an earlier binding
        _Trace.active = self
        return self

    def __exit__(self, *_: object) -> None:
        _Trace.active = None
        self.seen.clear()

    @staticmethod
    def adopt(module: nn.Module) -> _Point:
        trace = _Trace.active
        if trace is None:
            raise RuntimeError(f"{type(module).__name__} was not reached when its model was bound")
        point = _Point(trace.bound, len(trace.specs))
        setattr(module, NAME, point)
        return point

    def record(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        index = getattr(module, NAME).layer
        if index != len(self.specs):
            raise Unsupported(f"{self.name} runs one attention module as several layers, which one cache cannot hold")
        if mask is not None:
            raise Unsupported(f"{self.name} puts part of its attention into a mask")
        if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
            raise Unsupported(f"{self.name} has attention that is not causal")
        known = {"scaling", "sliding_window", "softcap", "s_aux"} | HARMLESS
        strange = [key for key, value in kwargs.items() if key not in known and value is not None]
        if strange:
            raise Unsupported(f"{self.name} calls attention with {', '.join(strange)}, which Octavo does not know")
        scale = kwargs.get("scaling")
        shares = next((i for i, (old_k, old_v) in enumerate(self.seen) if _same(k, old_k) and _same(v, old_v)), None)
        self.seen.append((k, v))
        self.specs.append(
            AttentionSpec(
                shape=LayerShape(k.shape[1], k.shape[2], v.shape[2], k.device, shares),
                heads=q.shape[1],
                scale=float(scale) if scale is not None else q.shape[2] ** -0.5,
                window=kwargs.get("sliding_window"),
                softcap=kwargs.get("softcap"),
                sinks=kwargs.get("s_aux"),
            )
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _pin_rope(hf: PreTrainedModel, context: int) -> None:
    """Make RoPE depend on the position alone. transformers' `dynamic` and `longrope` look at the longest position of
    the whole packed step, so a long neighbour would change a short sequence's frequencies.

    Up to max_position_embeddings, which caps the context, `dynamic` equals plain RoPE; `longrope` takes the factors
    that belong to `context`.
    """
    for module in hf.modules():
        types = getattr(module, "rope_type", None)
        if isinstance(types, str) and types in ("dynamic", "longrope"):
            module.rope_type = _pinned(module, types, "", None, context)
        elif isinstance(types, dict):
            module.rope_type = {
                layer_type: _pinned(module, kind, f"{layer_type}_", layer_type, context)
                for layer_type, kind in types.items()
            }


def _pinned(module: nn.Module, kind: str, prefix: str, layer_type: str | None, context: int) -> str:
    if kind == "longrope":
        inv_freq = getattr(module, f"{prefix}inv_freq")
        pinned, _ = ROPE_INIT_FUNCTIONS[kind](module.config, inv_freq.device, seq_len=context, layer_type=layer_type)
        inv_freq.copy_(pinned)
    return "default" if kind in ("dynamic", "longrope") else kind


@contextmanager
def unbound(bound: BoundModel, implementation: str = "sdpa") -> Iterator[PreTrainedModel]:
    """The plain transformers model for a while, with its own attention: the baseline of tests and benchmarks."""
    bound.hf.set_attn_implementation(implementation)
    try:
        yield bound.hf
    finally:
        bound.hf.set_attn_implementation(NAME)
