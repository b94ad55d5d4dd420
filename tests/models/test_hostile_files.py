"""A model directory with malformed or harmful files: it loads, or is refused by one line. Never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.models.files import open_tensors, read_json
from octavo.models.model import BUNDLED, Model
from tests.test_artefact import mutated

FILES = ["config.json", "generation_config.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pamphlet's files with the weights of a model of one small layer, in two shards."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(BUNDLED, path)
    (path / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(BUNDLED)
    config.update(
        {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "head_dim": 16, "dtype": "float32"}
    )
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").is_file()
    return path


def use(path: Path) -> None:
    llm = LLM(Model.load(path, device="cpu", dtype="fp32"), "fp32", session_len=64, max_batch_size=1)
    assert llm.model.fingerprint
    assert llm.tokenizer("Once")["input_ids"]
    assert llm.default_params


def one_line(path: Path) -> str | None:
    """The line by which the model is refused; None if it can be used."""
    try:
        use(path)
    except OctavoError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    return message


def test_a_file_that_may_not_be_read_is_not_called_corrupted(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "config.json"):
        (tmp_path / name).mkdir()
        with pytest.raises(OctavoError, match=rf"{name} cannot be read: Is a directory"):
            (read_json if name == "config.json" else open_tensors)(tmp_path / name)


def test_the_model_itself_is_used(directory: Path) -> None:
    assert one_line(directory) is None


@pytest.mark.parametrize("name", [*FILES, "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": 1'])
def test_what_is_not_a_json_object_is_named(name: str, content: bytes, directory: Path) -> None:
    file = directory / name
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        message = one_line(directory)
    finally:
        file.write_bytes(whole)
    assert message is not None
    assert name in message


@pytest.mark.parametrize("name", FILES)
def test_values_of_wrong_types_and_sizes_are_never_a_traceback(name: str, directory: Path) -> None:
    """Many values are not used by anybody: such a model is served."""
    file = directory / name
    text, draw = file.read_text(), random.Random(name)
    try:
        for _ in range(60):
            file.write_text(json.dumps(mutated(json.loads(text), draw, set())))
            one_line(directory)
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"vocab_size": "many"}, "vocab_size is many"),
        ({"num_attention_heads": 1.5}, "num_attention_heads is 1.5"),
        ({"rope_parameters": {"rope_type": "another", "rope_theta": 1.0}}, "config.json"),
    ],
)
def test_a_config_that_asks_for_the_impossible_is_refused(
    change: dict[str, object], reason: str, directory: Path
) -> None:
    file = directory / "config.json"
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | change))
    try:
        message = one_line(directory)
    finally:
        file.write_text(text)
    assert reason in (message or "")


@pytest.mark.parametrize("table", [None, [], {}, {"lm_head.weight": 3}, {"lm_head.weight": "../outside.safetensors"}])
def test_an_index_that_names_no_files_of_its_own_is_refused(table: object, directory: Path) -> None:
    file = directory / "model.safetensors.index.json"
    text = file.read_text()
    file.write_text(json.dumps({"weight_map": table}))
    try:
        message = one_line(directory)
    finally:
        file.write_text(text)
    assert "model.safetensors.index.json" in (message or "")


def test_a_flipped_byte_in_the_table_of_a_weight_file_is_never_a_traceback(directory: Path) -> None:
    file = sorted(directory.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    try:
        for at in range(0, size, max(1, size // 60)):
            data = bytearray(whole)
            data[at] ^= 1 << (at % 8)
            file.write_bytes(data)
            one_line(directory)
    finally:
        file.write_bytes(whole)
