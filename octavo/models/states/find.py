"""Which modules of a model keep states, and of what shapes: seen by a run with a cache that notes who asks it."""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from octavo.cache.states import StateShape
from octavo.errors import Unsupported
from octavo.models.states.mixers import MIXER, Mixer, PackedMixer, own_forward

TYPES = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}  # of layers that keep states, in a config
STATELESS = {"mlp", "moe"}  # of layers that keep nothing


@dataclass
class Found:
    """A mixer, and what it was given in the run that found it."""

    module: nn.Module
    mixer: Mixer
    rows: Tensor  # [1, T, width]
    beside: dict[str, Any]  # its other arguments
    asked: set[int] = field(default_factory=set)  # which of its layer's states are its own


class _Notes(DynamicCache):
    """A cache that notes which module asks it for states."""

    def __init__(self, hf: PreTrainedModel):
        super().__init__(config=hf.config)
        self.running: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []  # the innermost last
        self.found: dict[int, list[Found]] = {}  # by layer

    def note(self, layer: int, index: int) -> None:
        module, args, kwargs = self.running[-1]
        for known in self.found.setdefault(layer, []):
            if known.module is module:
                known.asked.add(index)
                return
        parameters = list(inspect.signature(own_forward(module)).parameters)
        arguments = dict(zip(parameters, args, strict=False)) | kwargs
        name = type(module).__name__
        cache = next((key for key, value in arguments.items() if value is self), None)
        if cache is None:
            raise Unsupported(f"{name} takes its states from elsewhere than its own arguments")
        del arguments[cache]
        tensors = [key for key, value in arguments.items() if isinstance(value, Tensor)]
        if len(tensors) != 1:
            raise Unsupported(f"{name} is called with {' and '.join(tensors)}, of which one can be cut by sequences")
        rows = arguments.pop(tensors[0])
        mixer = Mixer(0, layer, (), parameters, cache, tensors[0])
        self.found[layer].append(Found(module, mixer, rows, arguments, {index}))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self.note(layer_idx, state_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self.note(layer_idx, state_idx)
        return super().get_recurrent_state(layer_idx, state_idx)


def may_keep_states(hf: PreTrainedModel) -> bool:
    """Whether a model's config or forward speaks of states."""
    types = set(getattr(hf.config.get_text_config(), "layer_types", None) or ())
    return bool(types & TYPES) or _cache_parameter(hf) == "cache_params"


def _cache_parameter(hf: PreTrainedModel) -> str:
    return "cache_params" if "cache_params" in inspect.signature(hf.forward).parameters else "past_key_values"


@torch.inference_mode()
def find(hf: PreTrainedModel, ids: Tensor) -> list[Found]:
    """The modules of a model that keep states, in the order of their layers, as a run over `ids` [T] shows them. Raises
    Unsupported for states that are kept in another way."""
    name = hf.config.model_type
    try:
        notes = _Notes(hf)
    except Exception as error:  # of a kind of layer that it knows no cache for
        raise Unsupported(f"{name} keeps states in a cache that transformers' own does not replace") from error

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        notes.running.append((module, args, kwargs))

    def ends(*_: Any) -> None:
        notes.running.pop()

    given: dict[str, Any] = {_cache_parameter(hf): notes}
    if "position_ids" in inspect.signature(hf.forward).parameters:  # else a model may ask the cache for its length
        given["position_ids"] = torch.arange(len(ids), device=ids.device)[None]
    with ExitStack() as hooks:
        for module in hf.modules():
            hooks.callback(module.register_forward_pre_hook(begins, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(ends, always_call=True).remove)
        try:
            hf(input_ids=ids[None], use_cache=True, **given)
        except (Unsupported, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Unsupported(f"{name} keeps states in a cache that transformers' own does not replace") from error
    found: list[Found] = []
    for layer, own in sorted(notes.found.items()):
        held: Any = notes.layers[layer]
        if sum(len(each.asked) for each in own) > len(set().union(*(each.asked for each in own))):
            raise Unsupported(f"layer {layer} of {name} has several modules that share states")
        for each in own:
            each.mixer.index = len(found)
            each.mixer.states = tuple(
                StateShape(kind, index, tuple(state.shape[1:]), state.dtype, state.device)
                for kind in ("conv", "recurrent")
                for index, state in getattr(held, f"{kind}_states").items()
                if state is not None and index in each.asked
            )
            found.append(each)
    if len({id(each.module) for each in found}) < len(found):
        raise Unsupported(f"{name} runs one mixer as several layers, whose states one slot cannot hold")
    return found


def uninstall(hf: PreTrainedModel) -> None:
    """Have a model's mixers as they were before."""
    for module in hf.modules():
        if isinstance(module, PackedMixer):
            module.__class__ = type(module).__bases__[1]
            del vars(module)[MIXER]


def install(found: Sequence[Found]) -> None:
    """Have these modules compute packed steps."""
    for each in found:
        setattr(each.module, MIXER, each.mixer)
        own = type(each.module)
        if not issubclass(own, PackedMixer):
            each.module.__class__ = type(own.__name__, (PackedMixer, own), {"__module__": own.__module__})
