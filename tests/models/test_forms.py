"""The forms in which a model can be given: what stays in 4 bits, what is refused, and what else a file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.errors import OctavoError, Unsupported
from octavo.inputs import read_messages
from octavo.models.fingerprint import fingerprint
from octavo.models.load import load_model
from octavo.models.model import Model
from octavo.models.packed import packed_layers
from tests.models import forms
from tests.models.forms import GGUF_KINDS


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_only_gguf_weights_that_packed_layers_hold_exactly_stay_in_4_bits(kind: str, tmp_path: Path):
    forms.gguf(kind, tmp_path / "m.gguf")
    assert len(packed_layers(load_model(tmp_path / "m.gguf", dtype="fp32"))) == (14 if kind == "Q4_0" else 0)


def test_a_gguf_file_is_a_model_with_tokenizer_template_and_end(tmp_path: Path):
    path = tmp_path / "m.gguf"
    forms.gguf("F16", path)
    model = Model.load(str(path), device="cpu")
    assert model.tokenizer.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False) == "A"
    assert 1 in model.eos_ids
    assert str(model.bound.raw_format) == "bf16"
    before = model.fingerprint
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert fingerprint(path) != before
    path.write_bytes(data[:5000])
    with pytest.raises(OctavoError, match=r"m\.gguf cannot be read as a GGUF model"):
        load_model(path)


def adapter(path: Path, **changes: object) -> Path:
    forms.lora(path / "adapter")
    file = path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path / "adapter"


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"peft_type": "IA3"}, {"bias": "all"}, {"layer_replication": [[0, 1]]}],
)
def test_an_adapter_that_is_not_plain_lora_is_refused_with_the_command_that_merges(changes: dict, tmp_path: Path):
    with pytest.raises(Unsupported, match=rf"{next(iter(changes))} .*merge_and_unload"):
        load_model(adapter(tmp_path, **changes))


def test_an_adapter_that_does_not_fit_its_base_is_refused_by_name(tmp_path: Path):
    path = adapter(tmp_path)
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    save_file(tensors | {name: torch.zeros(5, 4)}, path / "adapter_model.safetensors")
    with pytest.raises(OctavoError, match=r"changes .*q_proj in the shape \(5, 64\)"):
        load_model(path)
    save_file({name.replace("q_proj", "x_proj"): tensors[name]}, path / "adapter_model.safetensors")
    with pytest.raises(OctavoError, match=r"x_proj, which the base model does not have"):
        load_model(path)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(OctavoError, match="does not name its base model"):
        load_model(path)


def test_another_adapter_is_another_model(tmp_path: Path):
    path = adapter(tmp_path)
    before = fingerprint(path)
    (path / "adapter_config.json").write_text(
        (path / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": 9')
    )
    assert fingerprint(path) != before != fingerprint(tmp_path / "base")


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "image", "video_url"])
def test_images_are_refused_by_name(kind: str):
    message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": kind, kind: {}}]}
    with pytest.raises(OctavoError, match=rf"is of type '{kind}': Octavo serves text alone"):
        read_messages([message])
