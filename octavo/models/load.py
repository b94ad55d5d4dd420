"""From a directory or a Hub id to a model, a tokenizer and the tokens that end an answer.

transformers builds and fills every architecture; this module decides what is accepted. Whatever could go wrong silently
is an error here: a tensor missing, left over or of another shape, a torn file, weights quantized by someone else, a
model that asks to run its own Python. Pickles are read with `weights_only=True`. What attention then does with the
model is not known here (see bind.py).
"""

import importlib.util
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    __version__,
)
from transformers.utils import logging

from octavo.errors import OctavoError, Unsupported
from octavo.models import internlm

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
# Chat models end a turn with one of these, which not every generation_config.json lists.
_TURN_ENDS = ("<eoa>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def resolve(model: str | Path) -> Path:
    """The directory of a model: itself where it holds a config.json, else a Hub id's snapshot, fetched if need be.

    A directory without config.json may still be a Hub id: `--work-dir internlm/internlm-chat-7b` makes one that holds
    a calibration only.
    """
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_file():
        raise OctavoError(f"{model} is a file: name the directory that holds config.json and the weights.")
    if not _HUB_ID.fullmatch(str(model)):
        if path.is_dir():
            raise OctavoError(f"The directory {model} has no config.json: name one that holds a Hugging Face model.")
        raise OctavoError(f"There is no directory {model}: name one that holds a Hugging Face model, or a Hub id.")
    return _download(str(model))


def _download(repo: str) -> Path:
    """A Hub snapshot without code and without a second copy of the weights."""
    # Subfolders and consolidated files hold the weights again, in other formats.
    doubles = ["*/*", "consolidated*"]
    files = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
    try:
        path = Path(huggingface_hub.snapshot_download(repo, allow_patterns=files, ignore_patterns=doubles))
        if not any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
            huggingface_hub.snapshot_download(repo, allow_patterns=["pytorch_model*.bin"], ignore_patterns=doubles)
    except hub.GatedRepoError as error:
        raise OctavoError(f"{repo} is gated: accept its terms on the Hub, then run `hf auth login`.") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise OctavoError(
            f"Neither a directory with a config.json nor a model on the Hub is named {repo}: check the name, "
            "or run `hf auth login` if the model is private."
        ) from error
    except Exception as error:  # the many ways a network fails
        raise OctavoError(
            f"No directory {repo} with a config.json is here and the Hub cannot be reached for it: "
            "check the network, or name a local directory."
        ) from error
    if not (path / "config.json").is_file():
        raise OctavoError(f"{repo} on the Hub has no config.json: name a repository in the transformers format.")
    return path


def load_config(path: Path) -> PreTrainedConfig:
    """The model's config, InternLM's as the Llama it is. Raises Unsupported for a model that needs its own code."""
    raw = _config_json(path)
    model_type = raw.get("model_type")
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
    try:
        if model_type in internlm.MODEL_TYPES:
            return internlm.llama_config(raw)
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Unsupported:
        raise
    except Exception as error:  # transformers validates with exceptions of many libraries
        raise OctavoError(f"{path}/config.json does not describe a {model_type} model: {_one_line(error)}") from error


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
    _refuse_quantized(path, model_format)
    config = load_config(path)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(f"{path} ({config.model_type}) is not a causal language model: name one that writes text.")
    _check_device(device, device_map)

    torch_dtype = _DTYPES.get(dtype, "auto")
    if load_format == "dummy":
        if device_map is not None:
            raise Unsupported("Dummy weights live on one device: leave the device map out.")
        model = _dummy(config, torch_dtype, torch.device(device))
    else:
        model = _filled(path, config, torch_dtype, device_map)
    if (path / "generation_config.json").is_file():
        read_json(path / "generation_config.json")
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.eval().requires_grad_(False)
    return model if device_map is not None else model.to(device)


def load_tokenizer(path: Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`. A Jinja file `chat_template` replaces the template the model brings."""
    if not any(next(path.glob(pattern), None) for pattern in _VOCABULARIES):
        raise OctavoError(f"{path} holds no tokenizer: add the model's tokenizer.json or tokenizer.model.")
    model_type = _config_json(path).get("model_type", "")
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    try:
        with _quiet():
            if _is_sentencepiece(path, model_type, settings):
                tokenizer = internlm.SentencePieceTokenizer.from_pretrained(path)
                tokenizer.chat_template = tokenizer.chat_template or internlm.CHAT_TEMPLATES.get(model_type)
            else:
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception
        if "auto_map" in settings and model_type not in internlm.MODEL_TYPES:
            raise Unsupported(
                f"The tokenizer in {path} asks to run its own Python code, which Octavo never does: "
                "use a model with a tokenizer.json."
            ) from error
        raise OctavoError(
            f"The tokenizer in {path} cannot be read ({_one_line(error)}): download its files again."
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
        if named:
            break
    # An unknown token has the id of <unk>, or none.
    ends = {end: tokenizer.convert_tokens_to_ids(end) for end in _TURN_ENDS}
    turns = [i for end, i in ends.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == end]
    return frozenset([*named, *turns])


def weight_files(path: Path) -> list[Path]:
    """The files of the weights, safetensors before `.bin`. Raises OctavoError where there is none or one is missing."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (path / single).is_file():
            return [path / single]
        index = path / f"{single}.index.json"
        if index.is_file():
            shards = sorted({path / shard for shard in read_json(index).get("weight_map", {}).values()})
            for shard in shards:
                if not shard.is_file():
                    raise OctavoError(f"The weight file {shard}, named in {index.name}, is missing: download it again.")
            return shards
    raise OctavoError(
        f"{path} holds no model.safetensors or pytorch_model.bin: download the weights, or use --load-format dummy."
    )


def open_tensors(file: Path) -> dict[str, torch.Tensor]:
    """A weight file's tensors by name, mapped from disk and not read yet. Raises OctavoError naming a torn file."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        # Only zip archives, all that torch has written since 2020, can be mapped.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise TypeError("it holds more than tensors")
        return tensors
    except SafetensorError as error:
        raise OctavoError(f"The weight file {file} is torn ({_one_line(error)}): download it again.") from error
    except Exception as error:  # unpickling fails in any way a byte can be wrong
        raise OctavoError(
            f"The weight file {file} is torn or holds more than plain tensors, and code in it is never run: "
            "download it again, or use safetensors."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises OctavoError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OctavoError(f"{file} cannot be read ({_one_line(error)}): download it again.") from error
    if not isinstance(found, dict):
        raise OctavoError(f"{file} is not a JSON object: download it again.")
    return found


def _filled(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype | str, device_map: str | dict[str, Any] | None
) -> PreTrainedModel:
    """The model with the checkpoint's weights, every one of them. Raises OctavoError naming those that do not fit."""
    # Opened before the model is built: a torn file is named at once, and by its name.
    tensors = {name: tensor for file in weight_files(path) for name, tensor in open_tensors(file).items()}
    build = AutoModelForCausalLM.from_pretrained
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if _config_json(path)["model_type"] == "internlm2":
        build = LlamaForCausalLM.from_pretrained
        source = {"pretrained_model_name_or_path": None, "state_dict": internlm.llama_tensors(tensors, config)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    del tensors

    # Where `device_map` sends layers to disk, .bin weights are rewritten there. The folder lives as long as the model.
    spill = tempfile.TemporaryDirectory(prefix="octavo-offload-") if device_map is not None else None
    with _quiet(bar=size > 1 << 30):
        model, report = build(
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
    leftovers = {name for name in report["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")}
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
    return model


def _dummy(config: PreTrainedConfig, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """The model with random weights, the same every time. The caller's random state is left alone."""
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), device:  # made where it lives: billions of numbers are drawn
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def _refuse_quantized(path: Path, model_format: str) -> None:
    if model_format not in ("hf", "awq"):
        raise OctavoError(f"The model format {model_format!r} is unknown: choose hf or awq.")
    found = _config_json(path).get("quantization_config")
    if model_format == "awq" or found is not None:
        method = (found or {}).get("quant_method", "awq")
        raise Unsupported(
            f"{path} holds weights quantized with {method}: 4-bit weights come in a later version, "
            "so name the 16-bit model."
        )


def _check_device(device: str, device_map: str | dict[str, Any] | None) -> None:
    """Fail before the weights are read rather than after."""
    if device_map is not None:
        if isinstance(device_map, str) and device_map not in ("auto", "balanced", "sequential"):
            raise OctavoError(f"The device map {device_map!r} is unknown: choose auto, balanced or sequential.")
        if importlib.util.find_spec("accelerate") is None:
            raise OctavoError("A device map needs accelerate: pip install 'octavo[offload]'.")
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OctavoError(f"The device {device!r} cannot be used here: {_one_line(error)}") from error


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
        raise OctavoError(f"The chat template {file} cannot be used: {_one_line(error)}") from error
    return template


def _config_json(path: Path) -> dict[str, Any]:
    """Of a model's directory, or of a config file alone."""
    return read_json(path if path.is_file() else path / "config.json")


def _one_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
