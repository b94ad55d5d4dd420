"""A model's tokenizer, with the chat template that the user or the model gives."""

import warnings
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from octavo.errors import OctavoError, Unsupported, one_line
from octavo.models import internlm
from octavo.models.files import BOM, base_of, config_json, quiet, read_json, without_marks
from octavo.models.gguf import read_tokenizer
from octavo.models.locate import is_gguf

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


def load_tokenizer(path: Path, chat_template: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`. A Jinja file `chat_template` replaces the template the model brings."""
    if is_gguf(path):
        with quiet():
            return _with_template(read_tokenizer(path), chat_template)
    if not _has_vocabulary(path):
        path = base_of(path)
    if not _has_vocabulary(path):
        raise OctavoError(f"{path} holds no tokenizer: add the model's tokenizer.json or tokenizer.model.")
    model_type = config_json(path).get("model_type", "")
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    try:
        with quiet(), without_marks(path) as readable:
            if _is_sentencepiece(path, model_type, settings):
                tokenizer = internlm.SentencePieceTokenizer.from_pretrained(readable)
                tokenizer.chat_template = tokenizer.chat_template or internlm.CHAT_TEMPLATES.get(model_type)
            else:
                tokenizer = AutoTokenizer.from_pretrained(readable, trust_remote_code=False, local_files_only=True)
            tokenizer("a")["input_ids"]  # some of its settings are looked at only now
    except Exception as error:  # tokenizers raises plain Exception
        if "auto_map" in settings and model_type not in internlm.MODEL_TYPES:
            raise Unsupported(
                f"The tokenizer in {path} asks to run its own Python code, which Octavo never does: "
                "use a model with a tokenizer.json."
            ) from error
        raise OctavoError(
            f"The tokenizer in {path} cannot be read ({one_line(error)}): download its files again."
        ) from error
    return _with_template(tokenizer, chat_template)


def _with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | Path | None) -> PreTrainedTokenizerBase:
    own = tokenizer.chat_template
    if isinstance(own, str):
        tokenizer.chat_template = own.removeprefix(BOM)
    if chat_template is not None:
        tokenizer.chat_template = _template(Path(chat_template), tokenizer)
    return tokenizer


def warn_of_strangers(tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str) -> None:
    """Warn of tokens that the tokenizer has and the model's embedding has no row for."""
    strangers = {i: text for text, i in tokenizer.get_added_vocab().items() if i >= vocab_size}
    if strangers:
        first = min(strangers)
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        warnings.warn(
            f"the tokenizer of {name} has tokens that the model's vocabulary of {vocab_size} lacks: "
            f"{strangers[first]!r} ({first}){more}. A prompt that holds one is refused",
            stacklevel=3,
        )


def _has_vocabulary(path: Path) -> bool:
    return any(next(path.glob(pattern), None) for pattern in _VOCABULARIES)


def _is_sentencepiece(path: Path, model_type: str, settings: dict[str, Any]) -> bool:
    """Whether tokenizer.model is all there is to go by: in InternLM, and in old Llamas."""
    if not (path / "tokenizer.model").is_file():
        return False
    llama = settings.get("tokenizer_class") in (None, "LlamaTokenizer", "LlamaTokenizerFast")
    alone = "auto_map" not in settings and not (path / "tokenizer.json").is_file()
    return model_type in internlm.MODEL_TYPES or (llama and alone)


def _template(file: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a chat template that renders."""
    try:
        template = file.read_text(encoding="utf-8-sig")  # a byte-order mark would become tokens of every prompt
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=template, tokenize=False)
    except Exception as error:  # a template is code, which fails in any way
        raise OctavoError(f"The chat template {file} cannot be used: {one_line(error)}") from error
    return template
