"""RoPE whose frequencies depend on the length of what is computed, made to depend on the position alone."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def short_context(config: PreTrainedConfig) -> int | None:
    """The longest context of a model's first RoPE factors, where it has others for longer ones (`longrope`)."""
    config = config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    rope = [part for part in (found, *found.values()) if isinstance(part, dict) and part.get("rope_type") == "longrope"]
    if not rope:
        return None
    return rope[0].get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def pin_rope(hf: PreTrainedModel, context: int) -> None:
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
