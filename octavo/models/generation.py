"""Where a model's answers end, and how it wants to be sampled, by generation_config.json, config.json and tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from octavo.errors import OctavoError
from octavo.models.files import read_json

FILE_NAME = "generation_config.json"
# What is used of it.
SETTINGS: dict[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "eos_token_id": (int, list),
}
# Chat models end a turn with one of these, which not every config lists.
TURN_ENDS = (
    "<eoa>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>",
    "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "[|endofturn|]", "<|endofturn|>",
)  # fmt: skip
# Of models with channels (gpt-oss) the first ends one message of a turn and the second the turn.
MESSAGE_END, CHANNELS_END = "<|end|>", "<|return|>"


def generation_settings(path: Path) -> dict[str, Any]:
    """The settings in the model's generation_config.json, none where there is no such file. Raises OctavoError for a
    value of another type than it should have."""
    file = path / FILE_NAME
    if not file.is_file():
        return {}
    found = read_json(file)
    for name, types in SETTINGS.items():
        value = found.get(name)
        each, types = (value, (int,)) if isinstance(value, list) and list in types else ([value], types)
        if value is not None and any(
            isinstance(x, bool) is not (bool in types) or not isinstance(x, types) for x in each
        ):
            raise OctavoError(f"{file}: {name} is {str(value)[:40]!r}, which is not a value for it.")
    return {name: found[name] for name in SETTINGS if found.get(name) is not None}


def eos_token_ids(
    config: dict[str, Any], settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The tokens that end an answer: all that the generation config and config.json name, the tokenizer's own, and the
    vocabulary's ends of a turn."""
    named = [id for found in (settings, config, config.get("text_config")) for id in _named(found)]
    own = tokenizer.eos_token_id
    return frozenset([*named, *([] if own is None else [own]), *_turn_ends(tokenizer)])


def _named(config: Any) -> list[int]:
    ids = config.get("eos_token_id") if isinstance(config, dict) else None
    named = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int for i in named):
        raise OctavoError(f"The model's eos_token_id is {str(ids)[:40]!r}: it must be a token id or a list of them.")
    return named


def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    # An unknown token has the id of <unk>, or none.
    ids = {end: tokenizer.convert_tokens_to_ids(end) for end in TURN_ENDS}
    known = {end: i for end, i in ids.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == end}
    if CHANNELS_END in known:
        known.pop(MESSAGE_END, None)
    yield from known.values()
