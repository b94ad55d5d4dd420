"""A GGUF file as a model: config, tokenizer, chat template and weights, as transformers reads them.

Weights become the model's type, whatever kind each tensor is of. Q4_0 is the exception: its numbers are d·(code − 8) in
groups of 32, which our packed layers hold exactly, so linear layers of that kind stay in 4 bits.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedConfig, PreTrainedModel

from octavo.errors import OctavoError, install, one_line
from octavo.models.packed import pack
from octavo.weights.layouts import Int4Weight

GROUP, MIDDLE = 32, 8  # of Q4_0: weights that share a scale, and the code of 0


def read_config(path: Path) -> PreTrainedConfig:
    """The config that the file's metadata describe. Raises OctavoError for a file that transformers cannot read."""
    return _config(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)  # the vocabulary is in the metadata, so it takes seconds
def _config(path: Path, _: int) -> PreTrainedConfig:
    with _named(path):
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def read_tokenizer(path: Path) -> Any:
    with _named(path):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def read_model(
    path: Path, architecture: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model with the file's weights, every one of them."""
    with _named(path):
        model, report = architecture.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            generation_config=GenerationConfig(),
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
    for what, names in (("lacks", report["missing_keys"]), ("has, of another shape,", report["mismatched_keys"])):
        if names:
            raise OctavoError(f"{path} {what} {sorted(map(str, names))[0]}: name a file that holds the whole model.")
    model.hf_quantizer, model.is_quantized = None, False  # the weights are plain now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _keep_in_4_bits(path, model)
    return model


def _keep_in_4_bits(path: Path, model: PreTrainedModel) -> None:
    """Put packed layers in place of the linear layers that are Q4_0 in the file and whose weight they hold exactly."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    for name, weight in _q4_0(path, model):
        layer = layers.get(name)
        if layer is None or layer.weight is model.get_input_embeddings().weight:
            continue
        if torch.equal(weight.dequantize().to(layer.weight.dtype), layer.weight):
            pack(model, name, weight)


def _q4_0(path: Path, model: PreTrainedModel) -> Iterator[tuple[str, Int4Weight]]:
    """The file's tensors of that kind, by the model's names for their layers, rows in the model's order."""
    from gguf import GGMLQuantizationType, GGUFReader
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    tensors = [tensor for tensor in GGUFReader(path).tensors if tensor.tensor_type == GGMLQuantizationType.Q4_0]
    if not tensors:
        return
    processor = TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    for tensor in tensors:
        columns, rows = (int(size) for size in tensor.shape) if len(tensor.shape) == 2 else (0, 0)
        if not rows or tensor.name not in names:
            continue
        blocks = torch.from_numpy(tensor.data.copy()).view(rows, columns // GROUP, 2 + GROUP // 2)
        halves = blocks[..., 2:]
        codes = torch.cat([halves & 15, halves >> 4], -1).flatten(1)

        def ordered(x: Tensor, name: str = tensor.name) -> Tensor:
            return torch.from_numpy(processor.process(x.numpy(), name).weights.copy())

        scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
        zeros = torch.full(scales.shape, MIDDLE, dtype=torch.uint8)
        yield names[tensor.name].removesuffix(".weight"), Int4Weight(ordered(codes), zeros, ordered(scales))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Around transformers' reader: what fails there, fails by the file."""
    if importlib.util.find_spec("gguf") is None:
        raise OctavoError(f"{path} is a GGUF file, and reading it needs gguf: {install('gguf')}")
    try:
        yield
    except (OctavoError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many libraries
        raise OctavoError(
            f"{path} cannot be read as a GGUF model ({one_line(error)}): name another file, or the model's own "
            "Hugging Face directory."
        ) from error
