"""A transformers model whose forwards attend to codes where they are given a CodedCache; others are as before.

The model gets an attention function that asks what the forward of this thread was given: a CodedCache's step, or
nothing, and then calls the function that was there before. What binding changes in the model (RoPE pinned to positions,
evaluation mode, the names of layers) is put back when the last cache is detached.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from octavo.errors import OctavoError, Unsupported
from octavo.models import states
from octavo.models.bind import bind, short_context
from octavo.models.hook import NAME, attended
from octavo.models.model import Model

BESIDE = "octavo-beside"  # our function beside that of the name that follows
HOOK = "octavo_hook"  # where a model keeps its Hook


class Step(Protocol):
    """What a CodedCache does in a forward."""

    def begin(self, batch: int, length: int, mask: Tensor | None) -> None: ...
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...
    def end(self, done: bool) -> None: ...


def _step() -> Step | None:
    """That of the forward that this thread runs, where it is one over a CodedCache."""
    found = attended.get()
    return found if hasattr(found, "begin") else None


class Hook:
    """What makes a model attend to codes, installed once for all of its caches."""

    def __init__(self, hf: PreTrainedModel):
        self.hf = hf
        self.users = 0  # caches that are attached
        self.before = hf.config.get_text_config()._attn_implementation or "eager"
        self._training = hf.training
        self._ropes = [
            (module, module.rope_type, {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)})
            for module in hf.modules()
            if isinstance(getattr(module, "rope_type", None), str | dict)
        ]
        kinds = {
            kind for _, types, _ in self._ropes for kind in (types.values() if isinstance(types, dict) else (types,))
        }
        self.pinned = bool(kinds & {"dynamic", "longrope"})  # its RoPE is right up to the context that it is bound for
        try:
            self.bound = bind(hf, short_context(hf.config), prove=False)  # states stay transformers' own
            if not self.bound.layers:
                raise Unsupported(f"{hf.config.model_type} has no attention: there are no K and V to keep as codes")
            hf.set_attn_implementation(_beside(self.before))
        except BaseException:
            self._put_back()
            raise
        self.model = _model(hf, self)
        self._handles = (
            hf.register_forward_pre_hook(self._begin, with_kwargs=True),
            hf.register_forward_hook(self._end, always_call=True),
        )
        setattr(hf, HOOK, self)

    @classmethod
    def of(cls, hf: PreTrainedModel) -> Hook:
        """The one that is installed, or a new one."""
        return vars(hf).get(HOOK) or cls(hf)

    @property
    def installed(self) -> bool:
        return vars(self.hf).get(HOOK) is self

    def release(self) -> None:
        """One cache less; without any the model is as it was before."""
        self._end()
        self.users -= 1
        if self.users == 0:
            delattr(self.hf, HOOK)
            for handle in self._handles:
                handle.remove()
            self._put_back()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For a while the model runs as the engine runs it, which calibrates."""
        self.hf.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self.hf.set_attn_implementation(_beside(self.before))

    def _put_back(self) -> None:
        self.hf.set_attn_implementation(self.before)
        self.hf.train(self._training)
        for module, rope_type, buffers in self._ropes:
            module.rope_type = rope_type
            for name, buffer in buffers.items():
                getattr(module, name).copy_(buffer)
        if self.before != NAME:
            states.uninstall(self.hf)
            for module in self.hf.modules():
                vars(module).pop(NAME, None)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end()
        given = inspect.signature(self.hf.forward).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        cache: Any = given.get("past_key_values")
        if getattr(cache, "hook", None) is None:
            return
        if cache.hook is not self:
            raise OctavoError("this cache belongs to another model: attach one to each")
        if given.get("output_attentions"):
            raise OctavoError("attention on codes returns no attention weights: leave output_attentions out")
        rows = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise OctavoError("attention_mask must be [batch, tokens]: a mask of another form hides what codes cannot")
        cache.begin(*rows.shape[:2], mask)
        attended.set(cache)

    def _end(self, _: Any = None, __: Any = None, output: Any = None) -> None:
        """After a forward, `output` None if it failed. After a Ctrl-C torch calls no hook: then it is late."""
        if (step := _step()) is not None:
            attended.set(None)
            step.end(output is not None)


def _beside(before: str) -> str:
    """The name of the attention function that attends to codes, or as `before` does."""
    if before.startswith(BESIDE):
        return before
    name = f"{BESIDE}-{before.replace('/', '-')}"

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if (step := _step()) is None:
            return _function(before, module)(module, query, key, value, attention_mask, **kwargs)
        if torch.is_grad_enabled() and query.requires_grad:
            raise OctavoError("attention on codes has no gradients: run the model under torch.inference_mode()")
        return step.attend(vars(module)[NAME], query, key, value), None

    AttentionInterface.register(name, attention)
    masks: Any = AttentionMaskInterface()
    if before in masks:
        made = masks[before]
        AttentionMaskInterface.register(
            name, lambda *args, **kwargs: None if _step() is not None else made(*args, **kwargs)
        )
    return name


def _function(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function of that name. Eager attention is each architecture's own, in the file of its module."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    functions: Any = AttentionInterface()
    return functions[name]


def _model(hf: PreTrainedModel, hook: Hook) -> Model:
    """As the engine knows it: by the directory that it was loaded from, where that is known."""
    name = str(hf.name_or_path or hf.config.model_type)
    path = Path(name)
    known = (path / "config.json").is_file()
    return Model(hook.bound, None, path, name, frozenset(), synthetic=not known)
