"""InternLM in its original layouts against its own arithmetic, written out here, and against sentencepiece itself."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from octavo.errors import OctavoError, Unsupported
from octavo.models import internlm
from octavo.models.files import config_json
from octavo.models.generation import eos_token_ids
from octavo.models.load import load_config, load_model
from octavo.models.tokenizer import load_tokenizer

HIDDEN, FFN, LAYERS, HEADS, VOCAB = 32, 48, 2, 4, 40
DIM = HIDDEN // HEADS
IDS = torch.tensor([1, 5, 9, 2, 7, 33, 12, 12])

V1 = {
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm.InternLMConfig",
        "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
    },
    "model_type": "internlm",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "bias": True,
    "rotary": {"base": 10000, "type": "dynamic"},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.29.2",
    "use_cache": True,
}
V2 = {key: value for key, value in V1.items() if key != "rotary"} | {
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "model_type": "internlm2",
    "num_key_value_heads": 2,
    "bias": False,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "attn_implementation": "eager",
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


def checkpoint_v1(bias: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for part in "qkvo":
            tensors[f"{at}self_attn.{part}_proj.weight"] = random(HIDDEN, HIDDEN)
            if bias:
                tensors[f"{at}self_attn.{part}_proj.bias"] = torch.randn(HIDDEN)
        tensors[f"{at}self_attn.rotary_emb.inv_freq"] = torch.ones(DIM // 2)  # the releases carry this buffer
        tensors[f"{at}mlp.gate_proj.weight"] = random(FFN, HIDDEN)
        tensors[f"{at}mlp.up_proj.weight"] = random(FFN, HIDDEN)
        tensors[f"{at}mlp.down_proj.weight"] = random(HIDDEN, FFN)
        tensors[f"{at}input_layernorm.weight"] = 1 + torch.randn(HIDDEN) / 4
        tensors[f"{at}post_attention_layernorm.weight"] = 1 + torch.randn(HIDDEN) / 4
    return tensors | {"model.norm.weight": 1 + torch.randn(HIDDEN) / 4, "lm_head.weight": random(VOCAB, HIDDEN)}


def checkpoint_v2(kv_heads: int, bias: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    rows = (HEADS + 2 * kv_heads) * DIM
    tensors = {"model.tok_embeddings.weight": torch.randn(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        tensors[f"{at}attention.wqkv.weight"] = random(rows, HIDDEN)
        tensors[f"{at}attention.wo.weight"] = random(HIDDEN, HIDDEN)
        if bias:
            tensors[f"{at}attention.wqkv.bias"] = torch.randn(rows)
            tensors[f"{at}attention.wo.bias"] = torch.randn(HIDDEN)
        tensors[f"{at}feed_forward.w1.weight"] = random(FFN, HIDDEN)
        tensors[f"{at}feed_forward.w3.weight"] = random(FFN, HIDDEN)
        tensors[f"{at}feed_forward.w2.weight"] = random(HIDDEN, FFN)
        tensors[f"{at}attention_norm.weight"] = 1 + torch.randn(HIDDEN) / 4
        tensors[f"{at}ffn_norm.weight"] = 1 + torch.randn(HIDDEN) / 4
    return tensors | {"model.norm.weight": 1 + torch.randn(HIDDEN) / 4, "output.weight": random(VOCAB, HIDDEN)}


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotate(x: torch.Tensor, theta: float, stretch: float = 1.0) -> torch.Tensor:
    """x [T, heads, DIM]; the first half of a head pairs with the second."""
    angles = torch.outer(torch.arange(len(x)) / stretch, theta ** (-torch.arange(0, DIM, 2) / DIM))  # [T, DIM/2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [T, HEADS, DIM], k and v [T, kv_heads, DIM]; one query, head and key at a time would read the same."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / DIM**0.5
    scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(q), HIDDEN)


def logits_v1(w: dict[str, torch.Tensor], theta: float = 10000.0) -> torch.Tensor:
    """The published forward pass of the first generation, [T, VOCAB]."""
    x = w["model.embed_tokens.weight"][IDS]
    for i in range(LAYERS):
        layer = {name.removeprefix(f"model.layers.{i}."): value for name, value in w.items()}
        h = rms_norm(x, layer["input_layernorm.weight"])
        q, k, v = (
            F.linear(h, layer[f"self_attn.{p}_proj.weight"], layer.get(f"self_attn.{p}_proj.bias")).view(-1, HEADS, DIM)
            for p in "qkv"
        )
        o = attend(rotate(q, theta), rotate(k, theta), v)
        x = x + F.linear(o, layer["self_attn.o_proj.weight"], layer.get("self_attn.o_proj.bias"))
        h = rms_norm(x, layer["post_attention_layernorm.weight"])
        h = F.silu(h @ layer["mlp.gate_proj.weight"].T) * (h @ layer["mlp.up_proj.weight"].T)
        x = x + h @ layer["mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def logits_v2(w: dict[str, torch.Tensor], kv_heads: int, theta: float, stretch: float = 1.0) -> torch.Tensor:
    """The published forward pass of the second: "b q (h gs d) -> b q h gs d", the last two of gs are k and v."""
    x = w["model.tok_embeddings.weight"][IDS]
    for i in range(LAYERS):
        layer = {name.removeprefix(f"model.layers.{i}."): value for name, value in w.items()}
        h = rms_norm(x, layer["attention_norm.weight"])
        qkv = F.linear(h, layer["attention.wqkv.weight"], layer.get("attention.wqkv.bias"))
        qkv = qkv.view(len(IDS), kv_heads, HEADS // kv_heads + 2, DIM)
        q, k, v = qkv[:, :, :-2].reshape(-1, HEADS, DIM), qkv[:, :, -2], qkv[:, :, -1]
        o = attend(rotate(q, theta, stretch), rotate(k, theta, stretch), v)
        x = x + F.linear(o, layer["attention.wo.weight"], layer.get("attention.wo.bias"))
        h = rms_norm(x, layer["ffn_norm.weight"])
        h = F.silu(h @ layer["feed_forward.w1.weight"].T) * (h @ layer["feed_forward.w3.weight"].T)
        x = x + h @ layer["feed_forward.w2.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w.get("output.weight", w["model.tok_embeddings.weight"]).T


def write(path: Path, config: dict, tensors: dict[str, torch.Tensor], safe: bool = False) -> Path:
    """Two `.bin` shards with an index, as the releases have, or one safetensors file."""
    (path / "config.json").write_text(json.dumps(config))
    if safe:
        save_file(tensors, path / "model.safetensors")
        return path
    where = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if where[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({}, 10000.0),
        ({"bias": False, "rotary": None}, 10000.0),
        ({"rotary": {"type": "origin", "base": 500000}}, 500000.0),
        # The 20B release and later 7B ones spell RoPE as Llama does.
        ({"rotary": None, "rope_theta": 20000.0, "rope_scaling": None, "num_key_value_heads": HEADS}, 20000.0),
        ({"rotary": None, "rope_scaling": {"type": "dynamic", "factor": 3.0}}, 10000.0),
    ],
)
@pytest.mark.parametrize("safe", [False, True])
def test_v1_is_the_original(tmp_path, changes, theta, safe):
    tensors = checkpoint_v1(changes.get("bias", True))
    model = load_model(write(tmp_path, V1 | changes, tensors, safe))
    torch.testing.assert_close(model(IDS[None]).logits[0], logits_v1(tensors, theta), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_v2_is_the_original(tmp_path, kv_heads, bias, safe):
    tensors = checkpoint_v2(kv_heads, bias)
    model = load_model(write(tmp_path, V2 | {"num_key_value_heads": kv_heads, "bias": bias}, tensors, safe))
    torch.testing.assert_close(model(IDS[None]).logits[0], logits_v2(tensors, kv_heads, 1e6), rtol=1e-4, atol=1e-4)


def test_v2_linear_rope_and_tied_output(tmp_path):
    tensors = checkpoint_v2(2, bias=False)
    del tensors["output.weight"]
    changes = {"rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True}
    model = load_model(write(tmp_path, V2 | changes, tensors))
    expected = logits_v2(tensors, 2, 1e6, stretch=2.0)
    torch.testing.assert_close(model(IDS[None]).logits[0], expected, rtol=1e-4, atol=1e-4)


def test_the_config_says_dynamic_rope_as_transformers_spells_it(tmp_path):
    for config, rope in (
        (V1, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}),
        (V2, {"rope_type": "dynamic", "rope_theta": 1000000.0, "factor": 2.0}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = load_config(tmp_path)
        assert found.model_type == "llama"
        assert {key: found.rope_parameters[key] for key in rope} == rope
        assert (found.attention_bias, found.eos_token_id) == (config["bias"], 2)
    (tmp_path / "config.json").write_text(json.dumps(V2 | {"rope_scaling": {"type": "yarn", "factor": 2.0}}))
    with pytest.raises(Unsupported, match="'yarn' RoPE"):
        load_config(tmp_path)


def test_dtype_and_dummy_weights(tmp_path):
    half = {name: tensor.half() for name, tensor in checkpoint_v2(2, bias=False).items()}
    path = write(tmp_path, V2 | {"torch_dtype": "float16"}, half)
    assert load_model(path).dtype == torch.float16
    assert load_model(path, dtype="bf16").dtype == torch.bfloat16
    assert load_model(path, load_format="dummy").model.layers[0].self_attn.q_proj.bias is None


def test_weights_that_do_not_fit_are_named(tmp_path):
    full = checkpoint_v2(2, bias=False)
    name = "model.layers.1.attention.wqkv.weight"
    with pytest.raises(OctavoError, match=f"{name} has 48 rows where config.json asks for 64"):
        load_model(write(tmp_path, V2, full | {name: torch.zeros(48, HIDDEN)}))
    with pytest.raises(OctavoError, match=r"lack model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_model(write(tmp_path, V2, {key: value for key, value in full.items() if key != name}))
    with pytest.raises(OctavoError, match="unknown to the model, v_head"):
        load_model(write(tmp_path, V2, full | {"v_head.weight": torch.zeros(1, HIDDEN)}))


def test_remote_code_is_never_run(tmp_path):
    for file in ("configuration_internlm", "modeling_internlm", "tokenization_internlm"):
        (tmp_path / f"{file}.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'boom')!r}).touch()")
    load_model(write(tmp_path, V1, checkpoint_v1(bias=True)))
    (tmp_path / "tokenizer.model").write_bytes(vocabulary())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_V1))
    load_tokenizer(tmp_path)
    assert not (tmp_path / "boom").exists()


# --- the tokenizer ---------------------------------------------------------------------------------------------------

SYMBOLS = ["<eoh>", "<eoa>", "<|User|>", "<|Bot|>"]
TOKENIZER_V1 = {
    "auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]},
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "</s>",
    "tokenizer_class": "InternLMTokenizer",
    "unk_token": "<unk>",
}
TEXTS = [
    "hello world",
    "  two leading spaces",
    " one",
    "trailing  ",
    "",
    " ",
    "line\nbreaks\n\n\tand tabs\r\n",
    "你好，世界！书生·浦语",
    "emoji 🙂👩‍👩‍👧 and é, ﬁ, Ⅳ, \u3000wide",
    "<|User|>:hello<eoh>\n<|Bot|>:",
    "a<eoa>b <eoh> <eoa>\n",
    "▁ the piece mark itself, <0x41> and <unk2>",
    "numbers 12345 3.14",
    "zero\x00byte",
    "\u202eright to left \u05d0",
]


def vocabulary(symbols: list[str] = SYMBOLS, dummy_prefix: bool = True) -> bytes:
    """A sentencepiece model as InternLM's: BPE with bytes to fall back on, text taken as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["hello world the quick brown fox", "你好 世界 书生 浦语", "line and tabs and numbers"] * 9
        ),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=symbols,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_files(path: Path, config: dict, model: bytes, tokenizer_config: dict | None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.model").write_bytes(model)
    if tokenizer_config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("tokenizer_config", [TOKENIZER_V1, None])
def test_ids_and_text_are_sentencepieces_own(tmp_path, dummy_prefix, tokenizer_config):
    model = vocabulary(dummy_prefix=dummy_prefix)
    tokenizer = load_tokenizer(tokenizer_files(tmp_path, V1, model, tokenizer_config))
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(tokenizer) == original.get_piece_size()
    for text in TEXTS:
        ids = original.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer(text)["input_ids"] == [original.bos_id(), *ids], text
        decoded = text.replace("▁", " ")  # how sentencepiece spells a space inside
        assert tokenizer.decode(ids) == original.decode(ids) == decoded, text
        assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == decoded
        assert tokenizer.decode([1, *ids]) == "<s>" + decoded
        # Any cut of an answer being streamed, through the middle of characters too.
        for n in range(len(ids)):
            assert tokenizer.decode(ids[n:]) == original.decode(ids[n:])
            assert tokenizer.decode(ids[:n]) == original.decode(ids[:n])
    batch = tokenizer(TEXTS[:3], padding=True)
    assert batch["input_ids"][2][-1] == original.encode(TEXTS[2])[-1], "padding goes to the left"
    assert tokenizer.decode([10**6]) == ""


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer"}])
def test_an_old_llama_with_sentencepiece_only_is_read_the_same_way(tmp_path, settings):
    model = vocabulary()
    tokenizer = load_tokenizer(tokenizer_files(tmp_path, {"model_type": "llama"}, model, settings))
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        assert tokenizer.encode(text) == [1, *original.encode(text)]
    assert tokenizer.chat_template is None


def test_another_models_own_tokenizer_code_is_refused(tmp_path):
    path = tokenizer_files(tmp_path, {"model_type": "llama"}, vocabulary(), TOKENIZER_V1)
    with pytest.raises(Unsupported, match="asks to run its own Python"):
        load_tokenizer(path)


def test_bos_and_eos_follow_the_tokenizer_config(tmp_path):
    model = vocabulary()
    ids = sentencepiece.SentencePieceProcessor(model_proto=model).encode("hello")
    for bos, eos in ((True, False), (False, True), (True, True), (False, False)):
        settings = TOKENIZER_V1 | {"add_bos_token": bos, "add_eos_token": eos}
        tokenizer = load_tokenizer(tokenizer_files(tmp_path, V1, model, settings))
        assert tokenizer.encode("hello") == [1] * bos + ids + [2] * eos


def test_v1_chat(tmp_path):
    model = vocabulary()
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(tokenizer_files(tmp_path, V1, model, TOKENIZER_V1))
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "world"},
        {"role": "user", "content": "你好"},
    ]
    text = "<|User|>:hello<eoh>\n<|Bot|>:world<eoa>\n<|User|>:你好<eoh>\n<|Bot|>:"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == "<s>" + text
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == [original.bos_id(), *original.encode(text)]
    assert tokenizer.encode("<s>" + text, add_special_tokens=False) == ids

    system = [{"role": "system", "content": "the fox"}, *messages[:1]]
    expected = "<s><|System|>:the fox\n<|User|>:hello<eoh>\n"
    assert tokenizer.apply_chat_template(system, tokenize=False) == expected
    eoa = original.piece_to_id("<eoa>")
    assert eos_token_ids(config_json(tmp_path), {}, tokenizer) == {2, eoa}
    assert tokenizer.decode(original.encode("world<eoa>"), skip_special_tokens=True) == "world<eoa>"


def test_v2_chat(tmp_path):
    # The released vocabulary has unused pieces that tokenizer_config.json renames.
    unused = [f"[UNUSED_TOKEN_{i}]" for i in (144, 145)]
    model = vocabulary(unused)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    end, start = (original.piece_to_id(piece) for piece in unused)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = TOKENIZER_V1 | {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", "fast.InternLM2TokenizerFast"]},
        "tokenizer_class": "InternLM2Tokenizer",
        "sp_model_kwargs": None,
        "decode_with_prefix_space": False,
        "added_tokens_decoder": {
            "0": {"content": "<unk>", **flags},
            "1": {"content": "<s>", **flags},
            "2": {"content": "</s>", **flags},
            str(end): {"content": "<|im_end|>", **flags},
            str(start): {"content": "<|im_start|>", **flags},
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    tokenizer = load_tokenizer(tokenizer_files(tmp_path, V2, model, settings))
    messages = [{"role": "system", "content": "the fox"}, {"role": "user", "content": "hello"}]
    text = "<s><|im_start|>system\nthe fox<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == text
    parts = ["system\nthe fox", "user\nhello", "assistant\n", "\n"]
    system, user, assistant, line = (original.encode(part) for part in parts)
    ids = [1, start, *system, end, *line, start, *user, end, *line, start, *assistant]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*original.encode("hello"), end], skip_special_tokens=True) == "hello"
    assert eos_token_ids(config_json(tmp_path), {}, tokenizer) == {2, end}
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [start, end]
    assert len(tokenizer) >= original.get_piece_size()


def test_the_models_own_template_and_a_file_come_before_the_built_in_one(tmp_path):
    path = tokenizer_files(tmp_path, V1, vocabulary(), TOKENIZER_V1 | {"chat_template": "own"})
    assert load_tokenizer(path).chat_template == "own"
    (tmp_path / "file.jinja").write_text("file")
    assert load_tokenizer(path, tmp_path / "file.jinja").chat_template == "file"
    path = tokenizer_files(tmp_path, V1, vocabulary(), TOKENIZER_V1)
    assert load_tokenizer(path).chat_template == internlm.CHAT_TEMPLATES["internlm"]


def test_a_torn_vocabulary_is_an_error(tmp_path):
    path = tokenizer_files(tmp_path, V1, vocabulary()[:500], TOKENIZER_V1)
    with pytest.raises(OctavoError, match=r"tokenizer in .* cannot be read"):
        load_tokenizer(path)
