"""From a quantized model in memory to a directory that others load: the AWQ form, as AutoAWQ writes it.

The weights are written by transformers, under the names of the checkpoint they came from. config.json is the original
one, whose spelling of options other programs know, with `quantization_config` added; the tokenizer's files, generation
defaults and licence are copied. All of it goes into a folder beside the target that is renamed at the end, so a run
that is interrupted leaves nothing half done.
"""

import json
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from octavo.errors import OctavoError, require_new
from octavo.models import internlm
from octavo.models.files import open_tensors, read_json, weight_files
from octavo.quant.format import dtype_name

SHARD = "5GB"  # the largest file of weights
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def save_awq(
    hf: PreTrainedModel,
    packed: dict[str, Tensor],
    group_size: int,
    source: Path,
    directory: Path,
    *,
    chat_template: str | None = None,
    shard: str = SHARD,
) -> list[str]:
    """Write `hf`, its 4-bit layers as the tensors `packed`, to the new `directory`; `source` is where it came from.

    What is not packed gets the types that it has in `source`, where `hf` computes in wider ones. `chat_template` is
    what its tokenizer uses, written where the files of `source` do not hold it. Returns the names of the modules that
    stay in 16 bits, as `modules_to_not_convert` lists them.
    """
    require_new(directory, source)
    _narrow(hf, source)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        new = Path(temporary) / "model"
        defaults, hf.generation_config = hf.generation_config, GenerationConfig()  # the file is copied as it is
        try:
            hf.save_pretrained(new, state_dict=hf.state_dict() | packed, max_shard_size=shard)
        except (OSError, SafetensorError) as error:
            raise OctavoError(f"the weights cannot be written beside {directory} ({error}): is there room?") from error
        hf.generation_config = defaults
        (new / "generation_config.json").unlink(missing_ok=True)
        for file in new.glob("*.safetensors"):  # written for the owner alone
            shutil.copymode(new / "config.json", file)
        kept = _kept(new, hf)
        quantization = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "modules_to_not_convert": kept,
        }
        _write_json(new / "config.json", _config(source, new, hf) | {"quantization_config": quantization})
        _copy_tokenizer(source, new, chat_template)
        if directory.exists():
            directory.rmdir()  # empty
        new.rename(directory)
    return kept


def _narrow(hf: PreTrainedModel, source: Path) -> None:
    """Give parameters the types of `source`, where those are narrower: in place, so that what is tied stays one."""
    types = {name: tensor.dtype for file in weight_files(source) for name, tensor in open_tensors(file).items()}
    usual = Counter(types.values()).most_common(1)[0][0]  # of those that have another name in the files
    for name, parameter in hf.named_parameters():
        if (own := types.get(name, usual)).itemsize < parameter.dtype.itemsize:
            parameter.data = parameter.data.to(own)


def _kept(new: Path, hf: PreTrainedModel) -> list[str]:
    """Modules with a matrix that was not quantized, experts as one. Embeddings need not be named, the head does."""
    names = {"lm_head"} if hf.get_output_embeddings() is not None else set()
    embeddings = {id(hf.get_input_embeddings().weight)}
    own = {name for name, p in hf.named_parameters(remove_duplicate=False) if id(p) in embeddings}
    for file in weight_files(new):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if len(tensors.get_slice(name).get_shape()) >= 2 and name not in own:
                    names.add(name)
    matrices = {name for name in names if not name.endswith((".qweight", ".qzeros", ".scales"))}
    return sorted({re.sub(r"(\.experts)\..*", r"\1", name).removesuffix(".weight") for name in matrices})


def _config(source: Path, new: Path, hf: PreTrainedModel) -> dict[str, Any]:
    """The original config.json, or of InternLM the one of the Llama it was loaded as."""
    config = read_json(source / "config.json")
    if config.get("model_type") in internlm.MODEL_TYPES:
        config = read_json(new / "config.json")
        config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])  # where older programs look
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype_name(hf.dtype)
    return config


def _copy_tokenizer(source: Path, new: Path, chat_template: str | None) -> None:
    for file in {file for pattern in COPIED for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, new / file.name)
    settings_file = new / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    if "auto_map" in settings and read_json(source / "config.json").get("model_type") in internlm.MODEL_TYPES:
        del settings["auto_map"]  # its code is not copied; what it read is a sentencepiece model
        _write_json(settings_file, settings | {"tokenizer_class": "LlamaTokenizer"})
    stored = new / "chat_template.jinja"
    if chat_template is not None and (not stored.is_file() or stored.read_text(encoding="utf-8") != chat_template):
        stored.write_text(chat_template, encoding="utf-8")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
