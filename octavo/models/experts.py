"""Experts of a mixture whose weights stay in 4 bits.

transformers keeps an architecture's experts in two tensors of three dimensions, and checkpoints in 4 bits hold each
expert's layers apart. Here every expert is three packed layers, each of which computes all rows that chose the expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from octavo.weights.linear import PackedLinear

# Model types whose experts compute down(act(gate(x)) ∘ up(x)) and are weighted by the router.
GATED = {"qwen2_moe", "qwen3_moe", "mixtral", "olmoe"}
# Mixtral's names in checkpoints, and the model's.
MIXTRAL = {".block_sparse_moe.": ".mlp.", ".w1": ".gate_proj", ".w3": ".up_proj", ".w2": ".down_proj"}


class PackedExpert(nn.Module):
    """One expert."""

    def __init__(self, hidden: int, inner: int, act: Callable[[Tensor], Tensor], dtype: torch.dtype):
        super().__init__()
        self.gate_proj, self.up_proj = (PackedLinear(hidden, inner, False, dtype) for _ in range(2))
        self.down_proj = PackedLinear(inner, hidden, False, dtype)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PackedExperts(nn.ModuleList):
    """All experts of a layer, called as transformers calls its own."""

    def __init__(self, experts: nn.Module):
        sizes = experts.hidden_dim, experts.intermediate_dim, experts.act_fn, experts.down_proj.dtype
        super().__init__(PackedExpert(*sizes) for _ in range(experts.num_experts))  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, hidden], which top_k experts each row chose and with what weights [T, k]."""
        out = torch.zeros_like(hidden_states)
        for chosen in top_k_index.unique().tolist():
            if chosen < len(self):  # one more is how padding is marked
                rows, place = torch.where(top_k_index == chosen)
                computed = self[chosen](hidden_states[rows]) * top_k_weights[rows, place, None]
                out.index_add_(0, rows, computed.to(out.dtype))
        return out


def is_experts(module: nn.Module, model_type: str) -> bool:
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return model_type in GATED and shapes == {"gate_up_proj": 3, "down_proj": 3}


def layer_name(checkpoint: str) -> str:
    """The model's name of a layer that a checkpoint in Mixtral's names holds."""
    if ".block_sparse_moe." in checkpoint:
        for theirs, ours in MIXTRAL.items():
            checkpoint = checkpoint.replace(theirs, ours)
    return checkpoint
