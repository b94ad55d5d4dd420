"""A fingerprint follows the weights and the config, and nothing else."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.errors import OctavoError
from octavo.models.fingerprint import fingerprint
from octavo.models.load import load_model

CONFIG = {
    "architectures": ["LlamaForCausalLM", "Another"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "lm_head.weight": torch.randn(64, 64, dtype=torch.bfloat16),
        "model.embed_tokens.weight": torch.randn(64, 64, dtype=torch.bfloat16),
        "model.layers.0.mlp.down_proj.weight": torch.randn(64, 96).to(torch.bfloat16),
        "model.layers.0.scale": torch.tensor(0.5),
        "model.norm.weight": torch.ones(64, dtype=torch.bfloat16),
    }


def write(
    path: Path, config: dict, weights: dict[str, torch.Tensor], kind: str = "safetensors", shards: int = 1
) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}.{kind}"] if shards == 1 else [f"{stem}-{i}.{kind}" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(weights)}
    for file in names:
        part = {name: tensor for name, tensor in weights.items() if where[name] == file}
        save_file(part, path / file) if kind == "safetensors" else torch.save(part, path / file)
    if shards > 1:
        (path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": where}))
    return path


@pytest.fixture
def original(tmp_path) -> str:
    return fingerprint(write(tmp_path / "original", CONFIG, tensors()))


def test_it_is_short_and_repeats(tmp_path, original):
    algorithm, digits = original.split(":")
    assert algorithm == "sha256"
    assert len(bytes.fromhex(digits)) == 16
    assert fingerprint(tmp_path / "original") == original


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_sharding_and_file_format_do_not_matter(tmp_path, original, kind, shards):
    assert fingerprint(write(tmp_path / "again", CONFIG, tensors(), kind, shards)) == original


def test_memory_layout_does_not_matter(tmp_path, original):
    transposed = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in tensors().items()}
    assert fingerprint(write(tmp_path / "bin", CONFIG, transposed, "bin")) == original


def test_bookkeeping_in_the_config_does_not_matter(tmp_path, original):
    changes = {
        "transformers_version": "9.9",
        "_name_or_path": "elsewhere",
        "torch_dtype": "float32",
        "use_cache": False,
        "architectures": ["Another", "LlamaForCausalLM"],
    }
    reordered = dict(reversed((CONFIG | changes).items()))
    assert fingerprint(write(tmp_path / "again", reordered, tensors())) == original
    nested = [CONFIG | {"text_config": {"hidden_size": 8, "dtype": dtype}} for dtype in ("float16", "bfloat16")]
    a, b = (fingerprint(write(tmp_path / str(i), config, tensors())) for i, config in enumerate(nested))
    assert a == b != original


def test_loading_the_model_does_not_matter(tmp_path):
    config = CONFIG | {"num_hidden_layers": 0}
    weights = {name: tensor for name, tensor in tensors().items() if "layers" not in name}
    path = write(tmp_path / "model", config, weights)
    before = fingerprint(path)
    for dtype in ("auto", "fp32"):
        load_model(path, dtype=dtype)
        assert fingerprint(path) == before


@pytest.mark.parametrize(
    "change", [{"rope_theta": 20000.0}, {"num_attention_heads": 8}, {"rope_scaling": {"type": "linear", "factor": 2.0}}]
)
def test_a_config_that_changes_the_math_shows(tmp_path, original, change):
    assert fingerprint(write(tmp_path / "changed", CONFIG | change, tensors())) != original


def test_weights_that_differ_show(tmp_path, original):
    found = {original}

    def changed(weights: dict[str, torch.Tensor]) -> None:
        found.add(fingerprint(write(tmp_path / str(len(found)), CONFIG, weights)))

    for at in (0, -1):  # the first and the last value are always sampled
        weights = tensors()
        weights["model.layers.0.mlp.down_proj.weight"].view(-1)[at] += 1
        changed(weights)
    weights = tensors()
    weights["model.norm.weight"][30] = 2  # small tensors are read whole
    changed(weights)
    weights = tensors()
    weights["model.layers.0.scale"] += 1
    changed(weights)
    changed(tensors() | {"lm_head.weight": tensors()["lm_head.weight"].view(32, 128)})
    changed(tensors() | {"lm_head.weight": tensors()["lm_head.weight"].view(torch.float16)})
    changed({name.replace("norm", "ln_f"): tensor for name, tensor in tensors().items()})
    weights = tensors()
    weights["lm_head.weight"], weights["model.embed_tokens.weight"] = (
        weights["model.embed_tokens.weight"],
        weights["lm_head.weight"],
    )
    changed(weights)
    assert len(found) == 9


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_finetuned_tensor_shows(tmp_path, kind):
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    nudged = weight + 1e-3 * torch.randn(512, 1) @ torch.randn(1, 512)
    a, b = (fingerprint(write(tmp_path / str(i), CONFIG, {"w": w}, kind)) for i, w in enumerate((weight, nudged)))
    assert a != b


def test_big_files_are_not_read(tmp_path):
    """Two GiB of zeros, a hole in the file system: few of their pages are touched, of which a fault brings 64 KiB."""
    size = 1 << 31
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    write(tmp_path / "big", CONFIG, {"w": torch.zeros(1)})
    with (tmp_path / "big" / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    before = _faults()
    fingerprint(tmp_path / "big")
    assert _faults() - before < size // (64 << 10) // 10


def _faults() -> int:
    """Of pages, in this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_minflt + used.ru_majflt


def test_torn_files_are_errors(tmp_path):
    path = write(tmp_path / "model", CONFIG, tensors())
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OctavoError, match=r"model\.safetensors is incomplete"):
        fingerprint(path)
    file.unlink()
    with pytest.raises(OctavoError, match=r"holds no model\.safetensors"):
        fingerprint(path)
    (path / "config.json").write_text("{")
    with pytest.raises(OctavoError, match=r"config\.json cannot be read"):
        fingerprint(path)
