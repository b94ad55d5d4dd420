"""Tokenizers and chat templates as they lie in directories; where answers end; how a model wants to be sampled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.models.generation import eos_token_ids, generation_settings
from octavo.models.model import Model
from octavo.models.tokenizer import load_tokenizer, warn_of_strangers
from octavo.text import encode_prompt

WORDS = ["<unk>", "</s>", "hello", "world", "<|im_end|>", "<s>"]
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def words(tmp_path) -> Path:
    """A directory with a tokenizer of a few words."""
    return write_words(tmp_path, WORDS)


def write_words(path: Path, words: list[str]) -> Path:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=None, dtype="float32",
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def test_a_chat_template_file_replaces_the_models(words):
    messages = [{"role": "user", "content": "hello"}]
    assert load_tokenizer(words).apply_chat_template(messages, tokenize=False) == "hello"
    file = words / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    for given in (file, str(file)):
        assert load_tokenizer(words, given).apply_chat_template(messages, tokenize=False) == "[hello]"
    for text in ("{% for m in %}", "{{ raise_exception('no') }}", "{{ 1 + 'one' }}", "{{ messages['x'].y }}"):
        file.write_text(text)
        with pytest.raises(OctavoError, match=r"own\.jinja cannot be used"):
            load_tokenizer(words, file)
    with pytest.raises(OctavoError, match=r"absent\.jinja cannot be used"):
        load_tokenizer(words, words / "absent.jinja")


def test_byte_order_marks_are_no_part_of_templates_or_configs(words):
    """Editors write them; as tokens of every prompt they would change every answer."""
    messages = [{"role": "user", "content": "hello"}]
    own = words / "own.jinja"
    own.write_bytes(BOM + b"[{{ messages[0]['content'] }}]")
    assert load_tokenizer(words, own).apply_chat_template(messages, tokenize=False) == "[hello]"
    for name in ("chat_template.jinja", "config.json", "tokenizer_config.json", "tokenizer.json"):
        (words / name).write_bytes(BOM + (words / name).read_bytes())
    assert load_tokenizer(words).apply_chat_template(messages, tokenize=False) == "hello"


def test_a_missing_or_broken_tokenizer_is_an_error(words):
    (words / "tokenizer.json").write_text("{")
    with pytest.raises(OctavoError, match="cannot be read"):
        load_tokenizer(words)
    (words / "tokenizer.json").unlink()
    with pytest.raises(OctavoError, match="holds no tokenizer"):
        load_tokenizer(words)


def test_bos_as_text_and_of_the_tokenizer_is_one_bos(words):
    tokenizer = load_tokenizer(words)
    tokenizer.bos_token = "<s>"
    assert encode_prompt(tokenizer, "<s> hello") == [5, 2]  # it adds none: the text's own stays
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    assert encode_prompt(tokenizer, "hello") == [5, 2]
    with pytest.warns(UserWarning, match="begins with <s>, which the tokenizer adds too"):
        assert encode_prompt(tokenizer, "<s> hello") == [5, 2]


def test_tokens_that_the_embedding_has_no_row_for_are_named(words):
    tokenizer = load_tokenizer(words)
    tokenizer.add_tokens(["<image>", "<audio>"])
    with pytest.warns(UserWarning, match=r"vocabulary of 6 lacks: '<image>' \(6\) and 1 more"):
        warn_of_strangers(tokenizer, 6, "words")


def test_an_answer_ends_with_any_token_that_anything_names_as_its_end(words):
    """A generation config that names one hides none of the others."""
    tokenizer = load_tokenizer(words)  # </s> is 1, <|im_end|> 4
    assert eos_token_ids({"eos_token_id": 3}, {"eos_token_id": [7, 8]}, tokenizer) == {1, 3, 4, 7, 8}
    assert eos_token_ids({"eos_token_id": [3, 5]}, {"eos_token_id": 0}, tokenizer) == {0, 1, 3, 4, 5}
    assert eos_token_ids({"text_config": {"eos_token_id": 6}}, {}, tokenizer) == {1, 4, 6}
    assert eos_token_ids({}, {}, tokenizer) == {1, 4}


@pytest.mark.parametrize(
    ("end", "others", "ends"),
    [("<|end|>", [], True), ("<turn|>", [], True), ("<|END_OF_TURN_TOKEN|>", [], True), ("[|endofturn|]", [], True),
     ("<end_of_utterance>", [], True), ("<|return|>", [], True), ("<|eot|>", [], True),
     ("<|end|>", ["<|return|>"], False), ("<|start|>", [], False)],
)  # fmt: skip
def test_known_ends_of_a_turn_end_an_answer(tmp_path, end, others, ends):
    """With channels <|end|> ends one message of an answer and <|return|> all of it."""
    tokenizer = load_tokenizer(write_words(tmp_path, [*WORDS, end, *others]))
    assert (len(WORDS) in eos_token_ids({}, {}, tokenizer)) is ends


@pytest.mark.parametrize("ids", ["2", [2, None], [2, "3"], True, {"id": 2}])
def test_ends_of_another_type_are_one_line(words, ids):
    tokenizer = load_tokenizer(words)
    with pytest.raises(OctavoError, match="eos_token_id"):
        eos_token_ids({"eos_token_id": ids}, {}, tokenizer)
    (words / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(OctavoError, match=r"generation_config\.json: eos_token_id"):
        generation_settings(words)


def test_settings_are_those_of_the_file_or_none(words):
    assert generation_settings(words) == {}
    file = words / "generation_config.json"
    file.write_bytes(BOM + json.dumps({"eos_token_id": [2, 9], "top_k": None, "other": 1}).encode())
    assert generation_settings(words) == {"eos_token_id": [2, 9]}
    file.write_text("{")
    with pytest.raises(OctavoError, match=r"generation_config\.json cannot be read"):
        generation_settings(words)


def test_a_directory_that_cannot_be_written_leaves_its_calibration_in_the_cache(words, monkeypatch):
    LlamaForCausalLM(LlamaConfig.from_pretrained(words)).save_pretrained(words)
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    model = Model.load(words, device="cpu")
    assert model.work_dir != model.path
    assert str(model.work_dir).startswith(os.environ["XDG_CACHE_HOME"])
    with pytest.warns(UserWarning, match="kept in .*cache"):
        made = LLM(model, "kv4", max_batch_size=1).calibration
    assert model.calibration_file() == model.work_dir / "kv_calibration.safetensors"
    assert LLM(model, "kv4", max_batch_size=1).calibration.header == made.header
