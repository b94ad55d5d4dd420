"""Decoder layers of the usual form, that of Llama, Mistral, Qwen2 and Qwen3, in two native calls: before and after
attention.

A step of a few rows passes all weights through the processor's caches and computes little with each. Between products
Python then finds its own memory thrown out, and takes as long as a tenth of the step. No layer is known by its class:
one that has the parts is asked for the rows of a trial, and taken over if its answer is that of the native calls. It
goes on as before in another type than float32, under another attention than ours, and while a module within it is
watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from octavo.models import hook
from octavo.models.bind import BoundModel
from octavo.models.changes import Undo, become, close, watched
from octavo.models.fused import SAME, FusedNorm
from octavo.weights import cpu
from octavo.weights.panels import PanelLinear

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # Qwen3's


class WholeLayer(nn.Module):
    native: cpu.Layer
    number: int  # of its attention
    watchers: list[Any]  # dicts of hooks of the modules within

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attend, given = hook.attended.get(), _given(self.native, args, kwargs)
        if not callable(attend) or any(self.watchers) or given is None:
            return super().forward(*args, **kwargs)
        return _compute(self.native, given, attend, 0 if attend is hook.itself else self.number)


Given = tuple[Tensor, Tensor, Tensor]
"""Rows [rows, width], and RoPE's cos and sin [rows, dim]."""


def _given(native: cpu.Layer, args: Any, kwargs: Any) -> Given | None:
    """What a layer is given, if the native calls take it."""
    x, turns = args[0] if args else None, kwargs.get("position_embeddings")
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.dim() != 3 or len(x) != 1:
        return None
    if not isinstance(turns, tuple) or len(turns) != 2:
        return None
    cos, sin = turns
    shape = (1, x.shape[1], native.dim)
    if any(turn.shape != shape or turn.dtype != torch.float32 or turn.stride(-1) != 1 for turn in (cos, sin)):
        return None
    return x[0].contiguous(), cos[0], sin[0]


def _compute(native: cpu.Layer, given: Given, attend: hook.Attend, number: int) -> Tensor:
    answers = attend(number, *native.before_attention(*given))
    return native.after_attention(answers.to(torch.float32).contiguous(), given[0])[None]


def take_over(bound: BoundModel, run: Callable[[hook.Attend], object]) -> Iterator[Undo]:
    """Take over the layers of a model on a CPU that are found to be of the form, in place. `run` is a forward of rows
    at different positions, which attends by what it is given."""
    found: dict[nn.Module, tuple[cpu.Layer, int]] = {}
    for number, attention in hook.attention_modules(bound.hf).items():
        for layer in bound.hf.modules():
            if getattr(layer, "self_attn", None) is attention and (native := _native(bound, layer, number)):
                found[layer] = native, number
    calls: dict[nn.Module, tuple[Any, Any, Any]] = {}
    attended: dict[int, tuple[Tensor, ...]] = {}

    def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[layer] = args, kwargs, output

    def attend(number: int, *sides: Tensor) -> Tensor:
        attended[number] = sides
        return hook.itself(number, *sides)

    with watched(layer.register_forward_hook(note, with_kwargs=True) for layer in found):
        run(attend)
    for layer, (args, kwargs, output) in calls.items():
        native, number = found[layer]
        if _answers(native, args, kwargs, attended[number], output):
            yield become(layer, WholeLayer, native=native, number=number, watchers=_watchers(layer))


def apart_of(bound: BoundModel) -> str | None:
    """How many layers of a model were not taken over, in words; None if all were."""
    whole, every = sum(isinstance(module, WholeLayer) for module in bound.hf.modules()), len(bound.layers)
    return f"computes {every - whole} of {every} layers module by module, which is slower" if whole < every else None


def _native(bound: BoundModel, layer: nn.Module, number: int) -> cpu.Layer | None:
    """The layer as the native calls have it; None if it lacks a part or has it in another kind or size."""
    spec = bound.layers[number]
    heads, kv_heads, dim = spec.heads, spec.shape.kv_heads, spec.shape.k_dim
    modules = dict(layer.named_modules())
    linears = [modules.get(name) for name in LINEARS]
    norms = [modules.get(name) for name in (*NORMS, *HEAD_NORMS)]
    if any(_watchers(layer)) or not all(isinstance(linear, PanelLinear) for linear in linears):
        return None
    if not all(isinstance(norm, FusedNorm) or (norm is None and i > 1) for i, norm in enumerate(norms)):
        return None
    x = torch.empty(0)
    weights = [cast(PanelLinear, linear).operand(x) for linear in linears]
    scales = [None if norm is None else (norm.scale, norm.epsilon) for norm in cast(list[FusedNorm | None], norms)]
    width = cpu.inputs(weights[0][0])
    outputs = [heads * dim, kv_heads * dim, kv_heads * dim, width, weights[4][1], weights[4][1], width]
    inputs = [width, width, width, heads * dim, width, width, weights[4][1]]
    sizes = [width, width, dim, dim]
    if (
        [out for _, out, _ in weights] != outputs
        or [cpu.inputs(panels) for panels, _, _ in weights] != inputs
        or len({(panels.dtype, cpu.in_pairs(panels)) for panels, _, _ in weights}) > 1
        or any(scale is not None and len(scale[0]) != size for scale, size in zip(scales, sizes, strict=True))
    ):
        return None
    return cpu.Layer(heads, kv_heads, dim, scales, weights)


def _watchers(layer: nn.Module) -> list[Any]:
    inner = [module for module in layer.modules() if module is not layer]
    own = chain.from_iterable((module._forward_hooks, module._forward_pre_hooks) for module in inner)
    return [*own, *hook.OF_ALL_MODULES]


@torch.inference_mode()
def _answers(native: cpu.Layer, args: Any, kwargs: Any, sides: tuple[Tensor, ...], output: Any) -> bool:
    """Whether the native calls hand attention the same q, k and v, and make the same of its answer."""
    given = _given(native, args, kwargs)
    if given is None or not isinstance(output, Tensor):
        return False
    found: list[Tensor] = []

    def attend(_: int, *own: Tensor) -> Tensor:
        found.extend(own)
        return hook.itself(0, *sides)

    found.append(_compute(native, given, attend, 0))
    return all(
        own.shape == theirs.shape and close(own, theirs, SAME)
        for own, theirs in zip(found, (*sides, output), strict=True)
    )
