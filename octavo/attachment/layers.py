"""The layers of a CodedCache: of attention ours, which keep codes, and of states transformers' own, which stay."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from octavo.errors import OctavoError


class Owner(Protocol):
    """A CodedCache, as its layers know it."""

    running: bool

    @property
    def columns(self) -> int: ...

    @property
    def installed(self) -> bool: ...


class CodedLayer(CacheLayerMixin):
    """A layer of attention, as transformers asks for it. It passes K and V on: attention writes and reads the codes."""

    supports_early_init = False
    is_croppable = True
    is_sliding = False

    def __init__(self, cache: Owner):
        super().__init__()
        self.cache = cache
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.cache.running:
            why = "is detached" if not self.cache.installed else "works in forwards of the whole model alone"
            raise OctavoError(f"this cache {why}: make one with octavo.attach(model) and pass it to that model")
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1


class CodedLayerWithStates(CodedLayer, LinearAttentionLayer):
    """A layer of attention that keeps states too."""

    is_croppable = LinearAttentionLayer.is_croppable

    def __init__(self, cache: Owner, states: int):
        CodedLayer.__init__(self, cache)
        LinearAttentionLayer.__init__(self, number_of_states=states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of states: of K and V there is nothing to prepare."""
        if not args:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)


def layers_of(cache: Owner, hf: PreTrainedModel, attending: int, states: bool) -> list[Any]:
    """The layers of an empty cache for a model in which so many layers attend, some beside `states`."""
    if not states:
        return [CodedLayer(cache) for _ in range(attending)]

    def ours(layer: Any) -> Any:
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            return CodedLayer(cache)
        both = isinstance(layer, CacheLayerMixin)
        return CodedLayerWithStates(cache, layer.number_of_states) if both else layer

    return [ours(layer) for layer in DynamicCache(config=hf.config).layers]


def state_layers(layers: Sequence[Any]) -> list[LinearAttentionLayer]:
    return [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]


def copy_states(layers: Sequence[Any], to: Sequence[Any]) -> None:
    """Have in the state layers of `to` what those of `layers` hold."""
    for source, copy in zip(state_layers(layers), state_layers(to), strict=True):
        vars(copy).update({name: deepcopy(value) for name, value in vars(source).items() if name != "cache"})


def select_states(layers: Sequence[Any], indices: Sequence[int]) -> None:
    """Have the states of the sequences of these numbers, in their order."""
    for layer in state_layers(layers):
        LinearAttentionLayer.reorder_cache(layer, torch.tensor(indices))


def states_nbytes(layers: Sequence[Any]) -> int:
    held = [(*layer.conv_states.values(), *layer.recurrent_states.values()) for layer in state_layers(layers)]
    return sum(state.nbytes for states in held for state in states if state is not None)
