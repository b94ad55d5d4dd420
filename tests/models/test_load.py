"""Directories in, models out: every way a checkpoint can be wrong is one clear error, never a warning."""

import importlib.util
import json
import pickle
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.errors import OctavoError, Unsupported
from octavo.models.files import weight_files
from octavo.models.load import load_config, load_model
from octavo.models.locate import locate, require_known, resolve
from octavo.models.model import Model
from octavo.parallel.start import start

IDS = torch.tensor([[1, 5, 9, 2, 7]])


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny()).eval()


def tiny(**changes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **changes,
    )


def write(path: Path, config: LlamaConfig, tensors: dict[str, torch.Tensor], kind: str, shards: int = 1) -> Path:
    """A checkpoint as its makers lay it out: config.json and one weight file, or shards with an index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = (
        [f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" for i in range(shards)] if shards > 1 else [f"{stem}.{suffix}"]
    )
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        part = {name: tensor.contiguous().clone() for name, tensor in tensors.items() if where[name] == file}
        save_file(part, path / file) if kind == "safetensors" else torch.save(part, path / file)
    if shards > 1:
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


# --- which directory -------------------------------------------------------------------------------------------------


def test_a_directory_with_a_config_is_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def hub_with(files: list[str], folder: Path, asked: list):
    """A Hub whose repositories hold `files`, filtered as the real one filters."""

    def snapshot_download(repo, allow_patterns, ignore_patterns):
        asked.append(repo)
        kept = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        return str(folder)

    return snapshot_download


def test_a_work_directory_named_like_the_model_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "internlm" / "internlm-chat-7b"
    work.mkdir(parents=True)
    (work / "kv_calibration.safetensors").touch()
    asked: list = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_with(["config.json"], tmp_path / "snap", asked))
    assert resolve("internlm/internlm-chat-7b") == tmp_path / "snap"
    assert set(asked) == {"internlm/internlm-chat-7b"}


def test_no_code_and_one_copy_of_the_weights_are_fetched(tmp_path, monkeypatch):
    common = ["config.json", "modeling_x.py", "tokenizer.model", "chat_template.jinja", "README.md", "onnx/model.onnx"]
    bins = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "training_args.bin"]
    both = ["model.safetensors", "consolidated.safetensors", "original/model.safetensors"]
    for name, files, weights in (("old", bins, bins[:1]), ("new", bins + both, ["model.safetensors"])):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_with(common + files, tmp_path / name, []))
        found = {str(f.relative_to(tmp_path / name)) for f in resolve("a/b").rglob("*") if f.is_file()}
        expected = {"config.json", "tokenizer.model", "chat_template.jinja", "pytorch_model.bin.index.json", *weights}
        assert found == expected


def test_what_cannot_be_resolved_says_why(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.onnx").touch()
    with pytest.raises(OctavoError, match=r"empty has no config\.json"):
        resolve(tmp_path / "empty")
    with pytest.raises(OctavoError, match="is a file"):
        resolve(tmp_path / "model.onnx")
    with pytest.raises(OctavoError, match="no directory"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(OctavoError, match="File name too long"):
        resolve("once" * 100)
    with pytest.raises(OctavoError, match=r"A Linear is no name of a model: .* octavo\.attach takes a Linear"):
        locate(torch.nn.Linear(1, 1))
    for error, message in (
        (hub.LocalEntryNotFoundError("offline"), "Hub cannot be reached"),
        (ConnectionError("refused"), "Hub cannot be reached"),
        (hub.HFValidationError("bad"), "check the name"),
    ):
        with monkeypatch.context() as patch:

            def fail(*_, error=error, **__):
                raise error

            patch.setattr(huggingface_hub, "snapshot_download", fail)
            with pytest.raises(OctavoError, match=message):
                resolve("octavo-test/none")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_with(["README.md"], tmp_path / "empty", []))
    with pytest.raises(OctavoError, match=r"on the Hub has no config\.json"):
        resolve("octavo-test/gguf-only")


@pytest.mark.parametrize("error", [hub.GatedRepoError, hub.RepositoryNotFoundError])
def test_gated_and_unknown_repositories_say_how_to_get_in(error, monkeypatch):
    def fail(*_, **__):
        raise error.__new__(error)  # needs an HTTP response to be built properly

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OctavoError, match="hf auth login"):
        resolve("octavo-test/gated")


def test_without_a_network_the_real_client_gives_the_clear_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OctavoError, match="Hub cannot be reached"):
        resolve("octavo-test/none")


def test_a_model_is_asked_for_once_before_anything_is_fetched(monkeypatch):
    """A name that the Hub does not know is said at once; one whose config is in the cache asks nobody."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    asked: list = []

    def unknown(_, repo, timeout):
        asked.append((repo, timeout <= 5))
        raise hub.RepositoryNotFoundError.__new__(hub.RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    with pytest.raises(OctavoError, match=r"Neither a directory .* octavo-test/none: check the name"):
        require_known("octavo-test/none")
    assert asked == [("octavo-test/none", True)]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/somewhere/config.json")
    require_known("octavo-test/none")
    assert len(asked) == 1


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_of_any_layout_give_the_same_logits(tmp_path, llama, kind, shards):
    model = load_model(write(tmp_path, llama.config, llama.state_dict(), kind, shards))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(IDS).logits, llama(IDS).logits, rtol=0, atol=0)


def test_safetensors_come_first(tmp_path, llama):
    write(tmp_path, llama.config, llama.state_dict(), "safetensors", 2)
    (tmp_path / "pytorch_model.bin").write_text("not weights")
    assert {file.suffix for file in weight_files(tmp_path)} == {".safetensors"}
    load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.bfloat16), ("fp32", torch.float32), ("float16", torch.float16), ("bf16", torch.bfloat16)],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_dtypes(tmp_path, llama, name, dtype, load_format):
    config = tiny(dtype="bfloat16")
    write(tmp_path, config, {k: v.bfloat16() for k, v in llama.state_dict().items()}, "safetensors")
    assert load_model(tmp_path, dtype=name, load_format=load_format).dtype == dtype


def test_dummy_weights_need_no_file_and_repeat(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    state = torch.get_rng_state()
    one, two = (load_model(tmp_path, load_format="dummy") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.model.layers[0].mlp.up_proj.weight.std() > 0
    assert torch.isfinite(one(IDS).logits).all()
    with pytest.raises(OctavoError, match="load-format dummy"):
        load_model(tmp_path)


def test_tied_embeddings_and_old_leftovers_are_no_alarm(tmp_path):
    config = tiny(tie_word_embeddings=True)
    torch.manual_seed(0)
    tied = LlamaForCausalLM(config).eval()
    tensors = tied.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.testing.assert_close(load_model(write(tmp_path, config, tensors, "bin"))(IDS).logits, tied(IDS).logits)
    del tensors["lm_head.weight"]
    model = load_model(write(tmp_path, config, tensors, "bin"))
    torch.testing.assert_close(model(IDS).logits, tied(IDS).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_said(tmp_path, llama):
    """transformers takes it, and so do we, but not in silence."""
    write(tmp_path, tiny(tie_word_embeddings=True), llama.state_dict(), "safetensors")
    with pytest.warns(UserWarning, match="ties lm_head to the embedding, but the weights hold another"):
        model = load_model(tmp_path)
    torch.testing.assert_close(model(IDS).logits, llama(IDS).logits, rtol=0, atol=0)


def test_shards_of_pickles_from_before_torch_wrote_archives_are_read(tmp_path, llama):
    write(tmp_path, llama.config, llama.state_dict(), "bin", 2)
    for file in weight_files(tmp_path):
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(load_model(tmp_path)(IDS).logits, llama(IDS).logits, rtol=0, atol=0)


def test_a_byte_order_mark_and_a_path_in_any_script_change_nothing(tmp_path, llama):
    path = write(tmp_path / "модель с пробелом", llama.config, llama.state_dict(), "safetensors")
    (path / "config.json").write_bytes(b"\xef\xbb\xbf" + (path / "config.json").read_bytes())
    torch.testing.assert_close(load_model(path)(IDS).logits, llama(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_weight_that_does_not_fit_is_named(tmp_path, llama, kind):
    full = llama.state_dict()
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(OctavoError, match=rf"lack {name}:"):
        load_model(write(tmp_path, llama.config, {k: v for k, v in full.items() if k != name}, kind))
    with pytest.raises(OctavoError, match=rf"another shape, {name} \(8, 32\) instead of \(16, 32\)"):
        load_model(write(tmp_path, llama.config, full | {name: torch.zeros(8, 32)}, kind))
    biases = {f"model.layers.{i}.self_attn.{p}_proj.bias": torch.zeros(16) for i in range(2) for p in "kv"}
    with pytest.raises(OctavoError, match=r"unknown to the model, .*k_proj\.bias.* and 1 more"):
        load_model(write(tmp_path, llama.config, full | biases, kind))
    with pytest.raises(OctavoError, match=r"lack lm_head\.weight"):
        load_model(write(tmp_path, llama.config, {k: v for k, v in full.items() if k != "lm_head.weight"}, kind))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_torn_or_missing_shard_is_named(tmp_path, llama, kind):
    write(tmp_path, llama.config, llama.state_dict(), kind, 3)
    shard = weight_files(tmp_path)[1]
    whole = shard.read_bytes()
    for torn in (whole[: len(whole) // 2], whole[:3], b"", b"<!DOCTYPE html>" * 40):
        shard.write_bytes(torn)
        with pytest.raises(OctavoError, match=rf"{shard.name} is incomplete"):
            load_model(tmp_path)
    shard.unlink()
    with pytest.raises(OctavoError, match=rf"{shard.name}.* is missing"):
        load_model(tmp_path)


def test_pickles_that_run_code_are_refused(tmp_path, llama):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "boom",)

    write(tmp_path, llama.config, llama.state_dict(), "bin", 2)
    file = weight_files(tmp_path)[0]
    for dump in (torch.save, lambda what, path: path.write_bytes(pickle.dumps(what, protocol=2))):
        dump({"model.norm.weight": Bomb()}, file)
        with pytest.raises(
            OctavoError, match=f"{file.name} is incomplete, or corrupted, or holds more than plain tensors"
        ):
            load_model(tmp_path)
    torch.save({"state_dict": {"model.norm.weight": torch.ones(4)}}, file)
    with pytest.raises(OctavoError, match=f"{file.name} .*more than plain tensors"):
        load_model(tmp_path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_device_map_spreads_the_model(tmp_path, llama, kind):
    write(tmp_path, llama.config, llama.state_dict(), kind, 2)
    expected = llama(IDS).logits
    torch.testing.assert_close(load_model(tmp_path, device_map="auto")(IDS).logits, expected)
    split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load_model(tmp_path, device_map=split | {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"})
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    torch.testing.assert_close(model(IDS).logits, expected)
    with pytest.raises(Unsupported, match="device map"):
        load_model(tmp_path, device_map="auto", load_format="dummy")


def test_a_device_map_without_accelerate_says_what_to_install(tmp_path, llama, monkeypatch):
    write(tmp_path, llama.config, llama.state_dict(), "safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(OctavoError, match=r"\[offload\]"):
        load_model(tmp_path, device_map="auto")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_unsupported_models_are_refused_with_a_reason(tmp_path):
    file = tmp_path / "config.json"
    for raw, error, message in (
        ({"model_type": "sparkle"}, Unsupported, "'sparkle' .*unknown to transformers"),
        ({"model_type": "sparkle", "auto_map": {"AutoConfig": "x.Y"}}, Unsupported, "asks to run its own Python"),
        ({}, OctavoError, "names no model_type"),
        ({"model_type": "vit"}, Unsupported, "not a causal language model"),
        ({"model_type": "llama", "hidden_size": "big"}, OctavoError, "hidden_size is big"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}, Unsupported, "bitsandbytes"),
    ):
        file.write_text(json.dumps(raw))
        with pytest.raises(error, match=message):
            load_model(tmp_path, load_format="dummy")
    file.write_text(json.dumps(tiny().to_dict()))
    for options, message in (
        ({"model_format": "awq"}, "are not quantized: leave --model-format out"),
        ({"model_format": "gguf"}, "choose hf or awq"),
        ({"load_format": "pt"}, "choose auto or dummy"),
        ({"dtype": "int8"}, "choose auto, bfloat16"),
    ):
        with pytest.raises(OctavoError, match=message):
            load_model(tmp_path, **{"load_format": "dummy", **options})
    for load in (Model.load, partial(start, count=2)):
        with pytest.raises(OctavoError, match="there is no device 'abacus'"):
            load(tmp_path, device="abacus")
    file.write_text("{")
    with pytest.raises(OctavoError, match=r"config\.json cannot be read"):
        load_config(tmp_path)


def test_a_known_type_with_remote_code_loads_as_transformers_knows_it(tmp_path, llama):
    write(tmp_path, llama.config, llama.state_dict(), "safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'boom')!r}).touch()")
    assert type(load_model(tmp_path)) is LlamaForCausalLM
    assert not (tmp_path / "boom").exists()
