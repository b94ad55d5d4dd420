"""Making 4-bit weights end to end: what is written is what was computed, by any loader, and nothing is half written."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from octavo import quantize as making
from octavo.cli import main
from octavo.cli.tables.quantize import error_table
from octavo.errors import OctavoError, Unsupported
from octavo.models.bind import bind, unbound
from octavo.models.load import load_model
from octavo.models.model import BUNDLED, Model
from octavo.models.save import save_awq
from octavo.models.tokenizer import load_tokenizer
from octavo.quantize import choose_group, choose_search, quantize
from octavo.weights import cpu
from octavo.weights.awq import Search
from octavo.weights.linear import PackedLinear
from tests.conftest import status_of
from tests.models.test_internlm import TOKENIZER_V1, V2, checkpoint_v2, vocabulary, write

WEIGHTS = BUNDLED / "model.safetensors"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # as published: the column of each 4-bit number of a word


@pytest.fixture(autouse=True, scope="module")
def coarse() -> Iterator[None]:
    """Fewer α than in earnest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.quantize.SEARCHES", (Search(4), Search(2, 16)))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """`pamphlet`, as a checkpoint of float32, quantized in memory, and as it was written."""
    source = tmp_path_factory.mktemp("source") / "pamphlet"
    shutil.copytree(BUNDLED, source)
    save_file({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}, source / WEIGHTS.name)
    model = Model.load(source, device="cpu", dtype="float32", plain_weights=True)
    ids = model.tokenizer((BUNDLED / "evaluation.txt").read_text(encoding="utf-8")[:4000])["input_ids"]
    directory = tmp_path_factory.mktemp("awq") / "pamphlet-4bit"
    quantized = quantize(model.bound, [ids[:256], ids[256:512]], group_size=128)
    save_awq(model.bound.hf, quantized.tensors, 128, source, directory, shard="3MB")
    return model, directory


def numbers(words: np.ndarray) -> np.ndarray:
    """int32 [rows, n] → [rows, 8n], by the published layout."""
    found = np.empty((words.shape[0], 8 * words.shape[1]), np.float32)
    for place, column in enumerate(ORDER):
        found[:, column::8] = (words.view(np.uint32) >> (4 * place)) & 15
    return found


def decoded(directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights as a plain model has them, read without any of Octavo's code."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    stored = {}
    for shard in sorted(set(index["weight_map"].values())):
        stored |= load_file(directory / shard)
    plain = {name: x.float() for name, x in stored.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for name in [name for name in stored if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        codes, zeros = (numbers(stored[f"{layer}.{key}"].numpy()) for key in ("qweight", "qzeros"))
        scales = stored[f"{layer}.scales"].float().numpy()
        group = len(codes) // len(scales)
        weight = (codes - zeros.repeat(group, 0)) * scales.repeat(group, 0)
        plain[f"{layer}.weight"] = torch.from_numpy(weight.T.copy())
    return plain


def test_an_independent_loader_computes_what_the_quantized_model_does(made: tuple[Model, Path]) -> None:
    model, directory = made
    config = LlamaConfig.from_pretrained(directory)
    del config.quantization_config
    other = LlamaForCausalLM(config).float().eval()
    missing, unexpected = other.load_state_dict(decoded(directory), strict=False)
    assert set(missing) <= {"lm_head.weight"}  # tied
    assert not unexpected
    other.tie_weights()
    ids = torch.arange(40, 104)[None]
    with unbound(model.bound) as hf, torch.inference_mode():
        torch.testing.assert_close(other(ids).logits, hf(ids).logits, rtol=1e-3, atol=2e-3)
    assert sum(isinstance(module, PackedLinear) for module in model.bound.hf.modules()) == 42


def test_what_is_written_loads_and_says_what_others_read(made: tuple[Model, Path]) -> None:
    model, directory = made
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    assert not list(directory.parent.glob(".pamphlet*")), "the temporary folder is gone"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (directory / name).read_bytes() == (BUNDLED / name).read_bytes()
    again = Model.load(directory, device="cpu", dtype="float32", model_format="awq")
    ids = torch.arange(40, 104)[None]
    with unbound(model.bound) as hf, unbound(again.bound) as loaded, torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, hf(ids).logits, rtol=1e-3, atol=2e-3)


def test_awq_costs_less_than_rounding_to_nearest() -> None:
    text = (BUNDLED / "evaluation.txt").read_text(encoding="utf-8")
    costs = {}
    for method in ("rtn", "awq"):
        model = Model.load(device="cpu", dtype="float32", plain_weights=True)
        ids = model.tokenizer(text[:12_000])["input_ids"]
        seen, held_out = [ids[:256], ids[256:512]], torch.tensor([ids[1024:1536]])
        with unbound(model.bound) as hf, torch.inference_mode():
            base = hf(held_out).logits.log_softmax(-1)
        quantize(model.bound, seen, method=method)  # type: ignore[arg-type]
        with unbound(model.bound) as hf, torch.inference_mode():
            own = hf(held_out).logits.log_softmax(-1)
        costs[method] = (base.exp() * (base - own)).sum(-1).mean().item()
    assert costs["awq"] < 0.8 * costs["rtn"]


def tiny(**more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, max_position_embeddings=128, **sizes | more)).float()


def windows(count: int = 2) -> list[list[int]]:
    return torch.randint(96, (count, 64), generator=torch.Generator().manual_seed(1)).tolist()


def test_layers_that_groups_do_not_divide_are_kept_and_named(tmp_path: Path) -> None:
    hf = tiny()
    source = tmp_path / "source"
    hf.save_pretrained(source)
    bound = bind(hf)
    quantized = quantize(bound, windows(), group_size=64)
    assert not any("down_proj" in name for name in quantized.tensors)
    kept = save_awq(bound.hf, quantized.tensors, 64, source, tmp_path / "new")
    assert kept == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_experts_stay_in_16_bits_and_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=128,
    )  # fmt: skip
    hf = Qwen3MoeForCausalLM(config).float()
    hf.save_pretrained(tmp_path / "source")
    bound = bind(hf)
    quantized = quantize(bound, windows(), group_size=64)
    kept = save_awq(bound.hf, quantized.tensors, 64, tmp_path / "source", tmp_path / "new")
    assert "model.layers.0.mlp.experts" in kept
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in quantized.tensors} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_not_quantized_keeps_the_types_of_the_checkpoint(tied: bool, tmp_path: Path) -> None:
    """--dtype fp32 is what the work is computed in; the files do not grow by it."""
    hf = tiny(tie_word_embeddings=tied).bfloat16()
    hf.model.norm.float()
    source = tmp_path / "source"
    hf.save_pretrained(source)
    bound = bind(load_model(source, dtype="fp32"))
    quantized = quantize(bound, windows(), group_size=32)
    save_awq(bound.hf, quantized.tensors, 32, source, tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == {"model.norm.weight"}
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_internlm_is_written_as_the_llama_it_was_loaded_as(tmp_path: Path) -> None:
    source = tmp_path / "internlm"
    source.mkdir()
    write(source, V2 | {"vocab_size": 40}, checkpoint_v2(2, bias=False))
    (source / "tokenizer.model").write_bytes(vocabulary())
    (source / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_V1))
    hf, tokenizer = load_model(source), load_tokenizer(source)
    bound = bind(hf)
    ids = [[i % 40 for i in range(60)]]
    quantized = quantize(bound, ids, group_size=32, method="rtn")
    new = tmp_path / "new"
    save_awq(bound.hf, quantized.tensors, 32, source, new, chat_template=str(tokenizer.chat_template))

    config = json.loads((new / "config.json").read_text())
    assert (config["model_type"], config["rope_theta"]) == ("llama", 1000000)
    assert not list(new.glob("*.py"))
    assert "auto_map" not in (new / "config.json").read_text() + (new / "tokenizer_config.json").read_text()
    again, words = load_model(new, model_format="awq"), load_tokenizer(new)
    with unbound(bound) as made, torch.inference_mode():
        torch.testing.assert_close(
            again(torch.tensor(ids)).logits, made(torch.tensor(ids)).logits, rtol=1e-3, atol=1e-3
        )
    chat = [{"role": "user", "content": "hello there"}]
    assert words.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert words("hello there").input_ids == tokenizer("hello there").input_ids


def test_a_scale_that_changes_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "absorb", lambda *_: None)
    monkeypatch.setattr(making, "search_scale", lambda weights, *_: (torch.full((weights[0].shape[1],), 1.5), 0.5))
    with pytest.raises(Unsupported, match="changed what it computes"):
        quantize(bind(tiny()), windows(), group_size=32)


def test_activations_that_overflow_are_refused_by_the_layers_name() -> None:
    bound = bind(tiny())
    bound.hf.model.layers[1].input_layernorm.weight.data[3] = torch.inf
    with pytest.raises(OctavoError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj are not finite"):
        quantize(bound, windows(), group_size=32)


def test_layers_that_are_rounded_are_let_go() -> None:
    hf = tiny()
    old = [weakref.ref(layer) for layer in hf.model.modules() if isinstance(layer, nn.Linear)]
    alive: list[int] = []

    def watch(what: str, *_: int) -> None:
        if what == "rounding":
            alive.append(sum(layer() is not None for layer in old))

    quantize(bind(hf), windows(), group_size=32, progress=watch)
    assert alive == list(reversed(range(len(old) + 1)))


@pytest.mark.parametrize("dead", ["weights", "inputs"])
def test_a_dead_layer_costs_nothing(dead: str) -> None:
    hf = tiny()
    mlp = hf.model.layers[0].mlp
    (mlp.up_proj if dead == "inputs" else mlp.down_proj).weight.data.zero_()
    quantized = quantize(bind(hf), windows(), group_size=32)
    errors = torch.tensor([(group.plain, group.error) for group in quantized.groups])
    assert errors.isfinite().all()
    assert (errors == 0).all(1).sum() == 1
    assert "nan" not in "".join(error_table(quantized).columns[-1].cells)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the native extension is not built")
def test_weights_in_the_processor_s_order_are_refused_with_the_way_out() -> None:
    with pytest.raises(OctavoError, match="plain_weights=True"):
        quantize(Model.load(device="cpu", dtype="bf16").bound, windows())


def test_groups_that_divide_no_layer_are_refused_with_those_that_do() -> None:
    with pytest.raises(Unsupported, match=r"groups of 128 divide no layer's inputs \(64, 96\): choose 32 or 64"):
        quantize(bind(tiny()), windows())


def test_the_group_that_fits_the_layers_is_chosen_and_one_that_does_not_is_answered_with_it() -> None:
    hf = tiny(hidden_size=192, intermediate_size=256)  # 192 is 3 × 64
    assert [choose_group(hf, asked) for asked in (None, 32, 64)] == [64, 32, 64]
    with pytest.raises(Unsupported, match=r"groups of 128 do not divide .* \(192\): choose 32 or 64"):
        choose_group(hf, 128)


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny()
    hf.save_pretrained(tmp_path / "source")
    bound = bind(hf)
    quantized = quantize(bound, windows(), group_size=32, method="rtn")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_awq(bound.hf, quantized.tensors, 32, tmp_path / "source", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--bits", "8"], "4 bits only, not to 8"),
        (["--group-size", "100"], "choose 32, 64, 128"),
        (["--method", "gptq"], "choose awq or rtn"),
        (["--work-dir", str(BUNDLED)], "is the model that is quantized"),
        (["--calib-dataset", "nothing.txt"], "no file and no set of texts named nothing.txt"),
    ],
)
def test_nonsense_is_refused_before_the_model_is_loaded(
    options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Model, "load", lambda *_, **__: pytest.fail("loaded"))
    assert status_of("quantize", "--work-dir", str(tmp_path / "new"), *options) == 2
    assert says in capsys.readouterr().err


def test_a_group_that_does_not_divide_the_width_is_refused_by_the_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer names the ones that do, and no file of weights is there to be read."""
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    assert status_of("quantize", tmp_path / "model", "--group-size", "128", "--work-dir", tmp_path / "new") == 2
    assert "(576): choose 32 or 64" in capsys.readouterr().err


def test_the_search_is_the_best_that_its_time_allows_and_what_it_takes_is_known() -> None:
    """Without a limit the finest, within none at all the quickest; a quicker one is known to take less."""
    hf = Model.load(device="cpu", dtype="float32", plain_weights=True).bound.hf
    best, seconds = choose_search(hf, 64, "awq", None)
    quickest, least = choose_search(hf, 64, "awq", 0.0)
    assert (best, quickest) == (Search(4), Search(2, 16))
    assert 0 < least < seconds
    assert choose_search(hf, 64, "rtn", None)[1] == 0


def test_a_directory_that_holds_something_and_a_quantized_model_are_refused(
    made: tuple[Model, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, says in (
        (["quantize", str(made[1]), "--work-dir", str(tmp_path / "new")], "quantized already (awq)"),
        (["quantize", "--work-dir", str(made[1])], "not empty"),
    ):
        with pytest.raises(SystemExit):
            main(args)
        assert says in capsys.readouterr().err


def test_the_verb_writes_a_model_that_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "new"

    def run(*args: str) -> str:
        assert status_of(*args) == 0
        return " ".join(capsys.readouterr().out.split())

    text = ("--calib-dataset", str(BUNDLED / "evaluation.txt"), "--calib-samples", "2", "--calib-seqlen", "128")
    assert "4.16 bits a weight" in run("quantize", "--work-dir", str(directory), "--method", "rtn", *text)
    run("calibrate", str(directory), "--model-format", "awq", *text)
    served = ("--model-format", "awq", "--kv", "int8", "--prompt", "Once upon a time", "--max-tokens", "4")
    assert run("generate", str(directory), *served)
