"""The text that the doctor measures on: split, so that formats are calibrated on one part and measured on the other."""

from pathlib import Path

from octavo.corpus import load_texts
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.measure.budget import Windows
from octavo.models.model import Model
from octavo.text_windows import consecutive_windows, self_windows, token_windows

SELF = "self"
CHARS = 400_000  # of a text that are looked at


def windows(
    model: Model, text: str | None, calibrated: int, size: Windows
) -> tuple[str, list[list[int]], list[list[int]]]:
    """The text's name, `calibrated` windows of its first part to calibrate on, and of the rest those to measure on.
    Raises OctavoError for a text that is too short for them."""
    measured, length = size.count, size.length
    count = calibrated + measured
    if model.synthetic:
        ids = model.bound.random_tokens(count, length)
        return "random tokens, since the weights are random too", ids[:calibrated], ids[calibrated:]
    if text == SELF:
        written = self_windows(
            LLM(model, session_len=min(length + 1, model.bound.max_context), max_batch_size=count), count, length
        )
        return "text that the model wrote", written[:calibrated], written[calibrated:]
    texts = load_texts(text)
    whole = "\n\n".join(texts)[:CHARS]
    tokens = len(model.tokenizer(whole, verbose=False)["input_ids"])
    needed = 5 * length * max(-(-calibrated // 3), -(-measured // 2))  # each part holds its windows once
    if tokens < needed:
        raise OctavoError(f"{texts.name} has {tokens:,} tokens and the doctor needs {needed:,}: name a longer --text")
    cut = len(whole) * 3 // 5
    return (
        Path(texts.name).name,
        token_windows([whole[:cut]], model.tokenizer, calibrated, length),
        consecutive_windows([whole[cut:]], model.tokenizer, length, measured),
    )
