"""A model's files: its directory or Hub snapshot, its JSON, and its weights as tensors by name.

Pickles are read with `weights_only=True`, and what is incomplete or corrupted is an error that names the file.
"""

import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from octavo.errors import OctavoError, one_line
from octavo.models.gguf import read_config
from octavo.models.locate import ADAPTER, is_gguf, resolve

BOM = "\ufeff"  # a byte-order mark, which some editors put before a text


def weight_files(path: Path) -> list[Path]:
    """The files of the weights, safetensors before `.bin`. Raises OctavoError where there is none or one is missing."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (path / single).is_file():
            return [path / single]
        index = path / f"{single}.index.json"
        if index.is_file():
            shards = _shards(index)
            for shard in shards:
                if not shard.is_file():
                    raise OctavoError(f"The weight file {shard}, named in {index.name}, is missing: download it again.")
            return shards
    raise OctavoError(
        f"{path} holds no model.safetensors or pytorch_model.bin: download the weights, or use --load-format dummy."
    )


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise OctavoError(f"{index} does not say which file each weight is in (weight_map): download it again.")
    for name in names.values():
        if Path(name).name != name:
            raise OctavoError(f"{index} names {name}, which is not a file of its own directory: download it again.")
    return sorted({index.parent / name for name in names.values()})


def open_tensors(file: Path) -> dict[str, torch.Tensor]:
    """A weight file's tensors by name, mapped from disk and not read yet. Raises OctavoError that names the file where
    it is incomplete or corrupted."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise OctavoError(f"The weight file {file} cannot be read: {error.strerror}.") from error
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
        raise OctavoError(
            f"The weight file {file} is incomplete or corrupted ({one_line(error)}): download it again."
        ) from error
    except Exception as error:  # unpickling fails in any way a byte can be wrong
        raise OctavoError(
            f"The weight file {file} is incomplete, or corrupted, or holds more than plain tensors, and code in it is "
            "never run: download it again, or use safetensors."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises OctavoError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OctavoError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise OctavoError(f"{file} cannot be read ({one_line(error)}): download it again.") from error
    if not isinstance(found, dict):
        raise OctavoError(f"{file} is not a JSON object: download it again.")
    return found


def config_json(path: Path) -> dict[str, Any]:
    """Of a model's directory, of a config file alone, or as a GGUF file describes it."""
    if is_gguf(path):
        return read_config(path).to_dict()
    path = base_of(path)
    return read_json(path if path.is_file() else path / "config.json")


def adapter_config(path: Path) -> dict[str, Any]:
    return read_json(path / ADAPTER)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a LoRA adapter and no model of its own."""
    return (path / ADAPTER).is_file() and not (path / "config.json").is_file()


def base_of(path: Path) -> Path:
    """The model's own directory: that of an adapter's base, or the path itself."""
    if not is_adapter(path):
        return path
    base = adapter_config(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise OctavoError(f"{path / ADAPTER} does not name its base model (base_model_name_or_path): add it there.")
    beside = path / base
    return resolve(beside if (beside / "config.json").is_file() else base)


def quantization(path: Path) -> tuple[dict[str, Any] | None, Path]:
    """What is said of quantized weights, and where: in config.json, or beside it as AutoAWQ and AutoGPTQ once did."""
    path = base_of(path)
    config = path if path.is_file() else path / "config.json"
    if is_gguf(path):
        return None, config
    found = config_json(path).get("quantization_config")
    if found is not None or path.is_file():
        return found, config
    for name in ("quant_config.json", "quantize_config.json"):
        if (path / name).is_file():
            return read_json(path / name), path / name
    return None, config


@contextmanager
def without_marks(path: Path) -> Iterator[Path]:
    """A model's directory, or config file, whose JSON files begin with no byte-order mark, which transformers does not
    read: itself, or for a while one of links to its files and of copies without the mark."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    marked = [file for file in files if file.suffix == ".json" and file.open("rb").read(3) == BOM.encode()]
    if not marked:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        for file in files:
            if file in marked:
                (Path(folder) / file.name).write_text(file.read_text(encoding="utf-8-sig"), encoding="utf-8")
            else:
                (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder) / path.name if path.is_file() else Path(folder)


@contextmanager
def quiet(bar: bool = False) -> Iterator[None]:
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
