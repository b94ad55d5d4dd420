"""From a directory or a Hub id to a model, a tokenizer and the tokens that end an answer.

transformers builds and fills every architecture; this module decides what is accepted. Whatever could go wrong silently
is an error here: a tensor missing, left over or of another shape, an incomplete file, weights quantized in another
way, a model that asks to run its own Python. Pickles are read with `weights_only=True`. What attention then does with
the model is not known here (see bind.py).
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    __version__,
)
from transformers.utils import logging

from octavo.devices import device_of
from octavo.errors import OctavoError, Unsupported, install, one_line
from octavo.models import internlm
from octavo.models.files import config_json, open_tensors, quantization, read_json, weight_files
from octavo.models.packed import fill, noise, with_packed_layers
from octavo.weights.checkpoint import PackedLayers, WeightFormat, read_format

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
# What is used of generation_config.json.
_GENERATION: dict[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "eos_token_id": (int, list),
}
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
# Chat models end a turn with one of these, which not every generation_config.json lists.
_TURN_ENDS = ("<eoa>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def load_config(path: Path) -> PreTrainedConfig:
    """The model's config, InternLM's as the Llama it is. Raises Unsupported for a model that needs its own code."""
    raw = config_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str | None):
        raise OctavoError(f"{path}/config.json: model_type is not text: download the file again.")
    if model_type not in CONFIG_MAPPING and model_type not in internlm.MODEL_TYPES:
        if "auto_map" in raw:
            raise Unsupported(
                f"{path} ({model_type}) asks to run its own Python code, which Octavo never does: "
                "use a model that transformers knows."
            )
        raise Unsupported(
            f"The model type {model_type!r} of {path} is unknown to transformers {__version__}: "
            "use a newer transformers, or another model."
        )
    _check_sizes(path, raw)
    try:
        if model_type in internlm.MODEL_TYPES:
            return internlm.llama_config(raw)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
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
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(f"{path} ({config.model_type}) is not a causal language model: name one that writes text.")
    _check_device(device, device_map)
    generation = _generation_config(path) if (path / "generation_config.json").is_file() else None

    torch_dtype = _DTYPES.get(dtype, "auto")
    if load_format == "dummy":
        if device_map is not None:
            raise Unsupported("Dummy weights live on one device: leave the device map out.")
        model = _dummy(path, config, torch_dtype, torch.device(device), format)
    else:
        model = _filled(path, config, torch_dtype, device_map, format)
    if generation is not None:
        model.generation_config = generation
    model.eval().requires_grad_(False)
    return model if device_map is not None else model.to(device)


def load_tokenizer(path: Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`. A Jinja file `chat_template` replaces the template the model brings."""
    if not any(next(path.glob(pattern), None) for pattern in _VOCABULARIES):
        raise OctavoError(f"{path} holds no tokenizer: add the model's tokenizer.json or tokenizer.model.")
    model_type = config_json(path).get("model_type", "")
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    try:
        with _quiet():
            if _is_sentencepiece(path, model_type, settings):
                tokenizer = internlm.SentencePieceTokenizer.from_pretrained(path)
                tokenizer.chat_template = tokenizer.chat_template or internlm.CHAT_TEMPLATES.get(model_type)
            else:
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            tokenizer("a")["input_ids"]  # some of its settings are looked at only now
    except Exception as error:  # tokenizers raises plain Exception
        if "auto_map" in settings and model_type not in internlm.MODEL_TYPES:
            raise Unsupported(
                f"The tokenizer in {path} asks to run its own Python code, which Octavo never does: "
                "use a model with a tokenizer.json."
            ) from error
        raise OctavoError(
            f"The tokenizer in {path} cannot be read ({one_line(error)}): download its files again."
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template, tokenizer)
    return tokenizer


def eos_token_ids(
    config: PreTrainedConfig, generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The tokens that end an answer: those of the first source that names any, and the vocabulary's ends of a turn."""
    named: list[int] = []
    for source in (generation_config, config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        named = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int for i in named):
            raise OctavoError(f"The model's eos_token_id is {str(ids)[:40]}: it must be a token id or a list of them.")
        if named:
            break
    # An unknown token has the id of <unk>, or none.
    ends = {end: tokenizer.convert_tokens_to_ids(end) for end in _TURN_ENDS}
    turns = [i for end, i in ends.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == end]
    return frozenset([*named, *turns])


def _filled(
    path: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    device_map: str | dict[str, Any] | None,
    format: WeightFormat | None,
) -> PreTrainedModel:
    """The model with the checkpoint's weights, every one of them. Raises OctavoError naming those that do not fit."""
    # Opened before the model is built: an incomplete file is named at once, and by its name.
    tensors = {name: tensor for file in weight_files(path) for name, tensor in open_tensors(file).items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    architecture: Any = AutoModelForCausalLM
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    packed = PackedLayers.take(format, tensors) if format is not None else None
    fused = config_json(path)["model_type"] == "internlm2"
    if fused or packed is not None:  # transformers is given tensors in place of the files
        if fused:
            tensors = internlm.llama_tensors(tensors, config)
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        source = {"pretrained_model_name_or_path": None, "state_dict": tensors}
    idle: set[str] = set()
    if packed is not None:
        if device_map is not None:
            raise Unsupported("4-bit weights live on one device: leave the device map out.")
        if fused:
            packed.rename(partial(internlm.llama_layers, config=config))
        architecture = with_packed_layers(architecture, partial(packed.packs, plain=set(tensors)))
        idle = packed.idle(tensors)
    del tensors

    # Where `device_map` sends layers to disk, .bin weights are rewritten there. The folder lives as long as the model.
    spill = tempfile.TemporaryDirectory(prefix="octavo-offload-") if device_map is not None else None
    with _quiet(bar=size > 1 << 30), _described_by(path, config):
        model, report = architecture.from_pretrained(
            **source,
            config=config,
            dtype=dtype,
            device_map=device_map,
            offload_folder=spill.name if spill else None,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    model._octavo_offload = spill
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
        fill(model, packed)
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
            return AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
        with _quiet():
            return noise(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, chosen, format)


def _generation_config(path: Path) -> GenerationConfig:
    """generation_config.json, whose values Octavo uses have the types they should have."""
    file = path / "generation_config.json"
    found = read_json(file)
    for name, types in _GENERATION.items():
        value = found.get(name)
        each, types = (value, (int,)) if isinstance(value, list) and list in types else ([value], types)
        if any(
            x is not None and (isinstance(x, bool) is not (bool in types) or not isinstance(x, types)) for x in each
        ):
            raise OctavoError(f"{file}: {name} is {str(value)[:40]!r}, which is not a value for it.")
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # it validates with exceptions of many kinds
        raise OctavoError(f"{file} cannot be used: {one_line(error)}") from error


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


def _check_device(device: str, device_map: str | dict[str, Any] | None) -> None:
    """Fail before the weights are read rather than after."""
    if device_map is not None:
        if isinstance(device_map, str) and device_map not in ("auto", "balanced", "sequential"):
            raise OctavoError(f"The device map {device_map!r} is unknown: choose auto, balanced or sequential.")
        if importlib.util.find_spec("accelerate") is None:
            raise OctavoError(f"A device map needs accelerate: {install('offload')}")
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OctavoError(f"The device {device!r} cannot be used here: {one_line(error)}") from error


def _is_sentencepiece(path: Path, model_type: str, settings: dict[str, Any]) -> bool:
    """Whether tokenizer.model is all there is to go by: in InternLM, and in old Llamas."""
    if not (path / "tokenizer.model").is_file():
        return False
    llama = settings.get("tokenizer_class") in (None, "LlamaTokenizer", "LlamaTokenizerFast")
    alone = "auto_map" not in settings and not (path / "tokenizer.json").is_file()
    return model_type in internlm.MODEL_TYPES or (llama and alone)


def _template(file: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a chat template that renders."""
    try:
        template = file.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=template, tokenize=False)
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        raise OctavoError(f"The chat template {file} cannot be used: {one_line(error)}") from error
    return template


@contextmanager
def _quiet(bar: bool = False) -> Iterator[None]:
    """transformers warns about what is an error here; say it once. Its progress `bar` is for what takes a while."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
