"""Which weights are these? A short digest that ties a calibration to the model it was measured on.

It covers config.json and, for each tensor, its name, shape, dtype and a kilobyte of its bytes, read from the files. So
it is the same whatever the load dtype, the device or the sharding, and takes milliseconds on a model of any size. It is
no proof of equality: one changed value between the samples goes unseen, a finetuned tensor does not.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from octavo.models.adapter import adapter_file
from octavo.models.files import adapter_config, base_of, config_json, is_adapter, open_tensors, weight_files
from octavo.models.locate import is_gguf

# Bookkeeping: what wrote the file, where from, and what changes no weight and no result.
_VOLATILE = {"transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "auto_map", "torch_dtype",
             "dtype", "use_cache", "_attn_implementation", "attn_implementation"}  # fmt: skip
_WINDOWS, _WINDOW = 4, 256  # samples of a tensor, and bytes in each
_OF_A_FILE = 4096  # samples of a GGUF file, whose tensors are not looked at one by one


def fingerprint(path: Path) -> str:
    """`sha256:` and 32 hex digits for the model in the directory `path`. Raises OctavoError for a weight file that
    cannot be read."""
    digest = hashlib.sha256()
    if is_gguf(path):
        data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        digest.update(_samples(data, _OF_A_FILE))
        return f"sha256:{digest.hexdigest()[:32]}"
    config = _canonical(config_json(path))
    if is_adapter(path):
        config = [config, adapter_config(path)]
    digest.update(json.dumps(config, sort_keys=True).encode())
    files = [*weight_files(base_of(path)), *([adapter_file(path)] if is_adapter(path) else [])]
    tensors = {name: tensor for file in files for name, tensor in open_tensors(file).items()}
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(_samples(tensor))
    return f"sha256:{digest.hexdigest()[:32]}"


def _canonical(config: Any) -> Any:
    """The config and its sub-configs without the volatile keys, `architectures` in one order."""
    if isinstance(config, list):
        return [_canonical(value) for value in config]
    if not isinstance(config, dict):
        return config
    kept = {key: _canonical(value) for key, value in config.items() if key not in _VOLATILE}
    if isinstance(kept.get("architectures"), list):
        kept["architectures"] = sorted(kept["architectures"])
    return kept


def _samples(tensor: torch.Tensor, windows: int = _WINDOWS) -> bytes:
    """The tensor's bytes in row-major order, whole if few, else windows from its first byte to its last."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if data.numel() <= windows * _WINDOW:
        return data.numpy().tobytes()
    last = data.numel() - _WINDOW
    starts = [last * i // (windows - 1) for i in range(windows)]
    return b"".join(data[start : start + _WINDOW].numpy().tobytes() for start in starts)
