"""From a directory to a model with its weights.

transformers builds and fills every architecture; this module decides what is accepted. Whatever could go wrong silently
is an error here: a tensor missing, left over or of another shape, an incomplete file, weights quantized in another
way, a model that asks to run its own Python. Pickles are read with `weights_only=True`. What attention then does with
the model is not known here (see bind.py).
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
)

from octavo.devices import device_of
from octavo.errors import LISTED, OctavoError, Unsupported, install, one_line
from octavo.models import internlm
from octavo.models.adapter import merge
from octavo.models.experts import layer_name
from octavo.models.files import (
    base_of,
    config_json,
    is_adapter,
    open_tensors,
    quantization,
    quiet,
    weight_files,
    without_marks,
)
from octavo.models.gguf import read_config, read_model
from octavo.models.locate import is_gguf
from octavo.models.packed import fill, noise, tied_layers, with_packed_layers
from octavo.quant.format import RAW_NAMES
from octavo.weights.checkpoint import PackedLayers, WeightFormat, read_format

if TYPE_CHECKING:
    from octavo.models.bind import BoundModel

_DTYPES = {name: getattr(torch, long) for long, short in RAW_NAMES.items() for name in (long, short)}
# The largest sizes that are believed: a config can ask for more layers or memory than any machine has.
_LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
}


class Division(Protocol):
    """How a model is divided among processes, each of which loads its own share (octavo/parallel)."""

    def arguments(self, architecture: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, Any]:
        """Arguments of `from_pretrained` by which it reads the share alone. Raises Unsupported for a model that cannot
        be divided so."""

    def rows(self, layer: str, outputs: int) -> slice:
        """Which outputs of a layer in 4 bits are in the share: those are read by Octavo itself."""

    def settle(self, model: PreTrainedModel) -> None:
        """Make of the loaded share plain layers that compute together with the others'."""

    def join(self, bound: BoundModel) -> BoundModel:
        """The bound share as the model that it is with the others."""


def load_config(path: Path) -> PreTrainedConfig:
    """The model's config, InternLM's as the Llama it is. Raises Unsupported for a model that needs its own code."""
    if is_gguf(path):
        return read_config(path)
    path = base_of(path)
    raw = config_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise OctavoError(f"{path}: the config names no model_type: name a model's config.json, or download it again.")
    if model_type not in CONFIG_MAPPING and model_type not in internlm.MODEL_TYPES:
        if "auto_map" in raw:
            raise Unsupported(
                f"{path} ({model_type}) asks to run its own Python code, which Octavo never does: "
                "use a model that transformers knows."
            )
        raise Unsupported(
            f"The model type {model_type!r} of {path} is unknown to transformers {__version__}: "
            f"use a newer transformers, or another model. {LISTED}"
        )
    _check_sizes(path, raw)
    try:
        if model_type in internlm.MODEL_TYPES:
            return internlm.llama_config(raw)
        with without_marks(path) as readable:
            config = AutoConfig.from_pretrained(readable, trust_remote_code=False, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # read by octavo.weights, not by transformers
        return config
    except Unsupported:
        raise
    except Exception as error:  # transformers validates with exceptions of many libraries
        raise OctavoError(f"{path}/config.json does not describe a {model_type} model: {one_line(error)}") from error


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | dict[str, Any] | None = None,
    load_format: str = "auto",
    model_format: str = "hf",
    division: Division | None = None,
) -> PreTrainedModel:
    """The causal language model in `path`, in eval mode and without gradients.

    `dtype` is "auto" (the checkpoint's) or a name like bfloat16 or bf16. `device_map` ("auto", or modules to devices)
    spreads the model over GPUs, CPU and disk with accelerate, and overrides `device`. `load_format` "dummy" fills the
    model with seeded random weights and reads no weight file.
    """
    if load_format not in ("auto", "dummy"):
        raise OctavoError(f"The load format {load_format!r} is unknown: choose auto or dummy.")
    if dtype != "auto" and dtype not in _DTYPES:
        raise OctavoError(f"The dtype {dtype!r} is unknown: choose auto, {', '.join(_DTYPES)}.")
    format = _weight_format(path, model_format)
    config = load_config(path)
    architecture_of(config, path)
    _check_device_map(device_map)

    torch_dtype = _DTYPES.get(dtype, "auto")
    if load_format == "dummy":
        if device_map is not None:
            raise Unsupported("Dummy weights live on one device: leave the device map out.")
        model = _dummy(path, config, torch_dtype, torch.device(device), format)
    else:
        model = _filled(base_of(path), config, torch_dtype, device_map, format, division)
        if is_adapter(path):
            if format is not None or device_map is not None:
                raise Unsupported(f"{path} is a LoRA adapter: its base must have 16-bit weights on one device.")
            merge(model, path)
    model.eval().requires_grad_(False)
    return model if device_map is not None else model.to(device)


def architecture_of(config: PreTrainedConfig, path: Path) -> type[PreTrainedModel]:
    """The class that writes text: a language model, or a model that reads images too and has one inside. Raises
    Unsupported for others."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise Unsupported(
        f"{path} ({config.model_type}) is not a causal language model: name one that writes text. {LISTED}"
    )


def _filled(
    path: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    device_map: str | dict[str, Any] | None,
    format: WeightFormat | None,
    division: Division | None,
) -> PreTrainedModel:
    """The model with the checkpoint's weights, every one of them. Raises OctavoError naming those that do not fit."""
    architecture: Any = architecture_of(config, path)
    if is_gguf(path):
        if device_map is not None:
            raise Unsupported("The weights of a GGUF file live on one device: leave the device map out.")
        with quiet():
            return read_model(path, architecture, config, dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
    # Opened before the model is built: an incomplete file is named at once, and by its name.
    tensors = {name: tensor for file in weight_files(path) for name, tensor in open_tensors(file).items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    heads = {name for name in tied_layers(architecture, config) if f"{name}.weight" in tensors}
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    packed = PackedLayers.take(format, tensors) if format is not None else None
    fused = config_json(path)["model_type"] == "internlm2"
    if fused or packed is not None:  # transformers is given tensors in place of the files
        if fused:
            tensors = internlm.llama_tensors(tensors, config)
        source = {"pretrained_model_name_or_path": None, "state_dict": tensors}
    idle: set[str] = set()
    if packed is not None:
        if tied_layers(architecture, config) & packed.places.keys():  # a head of its own, in 4 bits
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        if device_map is not None:
            raise Unsupported("4-bit weights live on one device: leave the device map out.")
        packed.rename(lambda layer: {layer_name(layer): None})
        if fused:
            packed.rename(partial(internlm.llama_layers, config=config))
        architecture = with_packed_layers(architecture, partial(packed.packs, plain=set(tensors)))
        idle = packed.idle(tensors)
    if division is not None:
        with _described_by(path, config):
            source |= division.arguments(architecture, config)
    del tensors

    # Where `device_map` sends layers to disk, .bin weights are rewritten there. The folder lives as long as the model.
    spill = tempfile.TemporaryDirectory(prefix="octavo-offload-") if device_map is not None else None
    with quiet(bar=size > 1 << 30), _described_by(path, config):
        model, report = architecture.from_pretrained(
            **source,
            config=config,
            generation_config=GenerationConfig(),  # else its file is read, and not as ours (generation.py)
            dtype=dtype,
            device_map=device_map,
            offload_folder=spill.name if spill else None,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    model._octavo_offload = spill
    if heads and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        warnings.warn(
            f"config.json of {path} ties {', '.join(heads)} to the embedding, but the weights hold another one: it is "
            "used. Set tie_word_embeddings to false there if that is right, or delete the tensor",
            stacklevel=4,
        )
    leftovers = {name for name in report["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")} - idle
    shapes = {f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in report["mismatched_keys"]}
    for what, names in (
        ("lack", report["missing_keys"]),
        ("have, of another shape,", shapes),
        ("have, unknown to the model,", leftovers),
        ("cannot be converted:", report.get("error_msgs")),
    ):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise OctavoError(f"The weights in {path} {what} {listed}: fetch config.json and the weights again.")
    if packed is not None:
        fill(model, packed, division.rows if division is not None else None)
    if division is not None:
        division.settle(model)
    return model


def _dummy(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype | str, device: torch.device, format: WeightFormat | None
) -> PreTrainedModel:
    """The model with random weights, the same every time. The caller's random state is left alone."""
    chosen: torch.dtype = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
    with (
        torch.random.fork_rng(device_of(device).generators),
        device,
        _described_by(path, config),
    ):  # made where it lives: billions of numbers are drawn
        torch.manual_seed(0)
        if format is None:
            return architecture_of(config, path)._from_config(config, dtype=chosen)
        with quiet():
            return noise(architecture_of(config, path), config, chosen, format)


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    """Raises OctavoError for a size that no model has. Names that a model type spells in its own way are not known."""
    for config in [part for part in (raw, raw.get("text_config")) if isinstance(part, dict)]:
        for name, largest in _LARGEST.items():
            size = config.get(name)
            several = size if isinstance(size, list) else [size]  # one for each layer
            if any(x is not None and (type(x) is not int or not 0 <= x <= largest) for x in several):
                raise OctavoError(
                    f"{path}/config.json: {name} is {str(size)[:40]}; it must be at most {largest}: "
                    "download the file again."
                )


@contextmanager
def _described_by(path: Path, config: PreTrainedConfig) -> Iterator[None]:
    """Around the code of transformers that builds a model: what fails there, fails by the config's values."""
    try:
        yield
    except (OctavoError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise OctavoError(
            f"{path}/config.json does not describe a {config.model_type} model that can be built: {one_line(error)}"
        ) from error


def _weight_format(path: Path, model_format: str) -> WeightFormat | None:
    """How the linear layers' weights are quantized; None if they are not. Raises Unsupported for what is not read."""
    if model_format not in ("hf", "awq"):
        raise OctavoError(f"The model format {model_format!r} is unknown: choose hf or awq.")
    found, where = quantization(path)
    format = read_format(found, str(where)) if found is not None else None
    if model_format == "awq" and (format is None or format.method != "awq"):
        holds = "not quantized" if format is None else f"quantized with {format.method}"
        raise OctavoError(f"The weights in {path} are {holds}: leave --model-format out.")
    return format


def _check_device_map(device_map: str | dict[str, Any] | None) -> None:
    """Fail before the weights are read rather than after."""
    if isinstance(device_map, str) and device_map not in ("auto", "balanced", "sequential"):
        raise OctavoError(f"The device map {device_map!r} is unknown: choose auto, balanced or sequential.")
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise OctavoError(f"A device map needs accelerate: {install('offload')}")
