"""What a model will take, without its weights: built and traced on torch's meta device, where tensors have shapes only.

The same dry run that binds a model for serving (bind.py) tells the geometry of every layer's cache, so nothing is
guessed from field names of a config, and most models that Octavo refuses are refused here with the same words; some
show only by their values that they cannot be served.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from octavo.cache.plan import LayerShape
from octavo.cache.states import StatePlan
from octavo.devices import HOST, device_of
from octavo.errors import OctavoError, one_line
from octavo.models.bind import BoundModel, bind
from octavo.models.load import load_model
from octavo.models.packed import fitting_groups, packable, packed_layers, parameters, weight_bytes
from octavo.units import format_bytes


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model: its layers' K and V rows, and its weights."""

    shapes: list[LayerShape]
    dtype: torch.dtype
    max_context: int
    weights: int  # bytes of all parameters, tied ones once
    parameters: int  # tied ones once, in whatever type
    linear: int  # those of linear layers that `octavo quantize` packs in groups of `group`, or that are packed
    packed: int  # those of them that are in 4 bits already
    packed_bytes: int
    group: int = 128  # inputs that share a scale
    states: StatePlan = field(default_factory=StatePlan)  # of the layers that keep states of fixed size
    ranks: tuple[int, ...] = (1,)  # among how many processes it can be divided

    @classmethod
    def trace(cls, path: Path, dtype: str = "auto", model_format: str = "hf") -> Geometry:
        """Of the model in directory `path`, or of a config.json alone; no weight file is read.

        `dtype` is the config's, or a name like bf16. Raises Unsupported for models that Octavo refuses.
        """
        with torch.device("meta"):
            hf = load_model(path, dtype=dtype, device="meta", load_format="dummy", model_format=model_format)
        layers = packed_layers(hf).values()
        packed = sum(layer.in_features * layer.out_features for layer in layers)
        packed_bytes = sum(layer.nbytes for layer in layers)
        own, weights, count = hf.dtype, weight_bytes(hf), parameters(hf)
        group = fitting_groups(hf)[-1]
        linear = packed + sum(layer.weight.numel() for layer in packable(hf, group).values())
        try:
            bound = bind(hf.to(torch.bfloat16))  # what experts' kernels want on the meta device; no shape depends on it
        except OctavoError:
            raise
        except Exception as error:  # code that looks at values, which a meta tensor has none of
            bound = _with_values(path, dtype, weights, error)
        shapes = [replace(shape, dtype=own) for shape in bound.shapes]
        states = bound.states.of(own)
        ranks = (1,) if bound.states else rank_counts(hf.config)
        return cls(shapes, own, bound.max_context, weights, count, linear, packed, packed_bytes, group, states, ranks)


def rank_counts(config: PreTrainedConfig) -> tuple[int, ...]:
    """Among how many processes octavo/parallel divides a model: as its heads allow, and not at all where transformers
    has no tensor-parallel plan."""
    text = config.get_text_config()
    if not text.base_model_tp_plan:
        return (1,)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return tuple(n for n in range(1, heads + 1) if not heads % n and (not kv_heads % n or not n % kv_heads))


def _with_values(path: Path, dtype: str, weights: int, error: Exception) -> BoundModel:
    """Bound with random weights: the few models whose code cannot run on shapes alone."""
    if 2 * weights > device_of(HOST).free_memory():
        raise OctavoError(
            f"{path} cannot be traced without weights ({one_line(error)}), and {format_bytes(weights)} of "
            "random ones are too many for this machine."
        ) from error
    return bind(load_model(path, dtype=dtype, load_format="dummy"))
