"""Will this model work, and will its cache quantize well? Everything here is measured on the model itself, in a minute.

    anatomy      geometry, positions, key offsets and wide channels      inspection.py
    self-check   packed = alone = transformers                           selfcheck.py
    formats      KL of every format on text, whole and layer by layer    here, through accuracy.py
    findings     what follows from it, in words                          advice.py

The text is split: calibrated formats are calibrated on its first part, and all are measured on the rest. On a large
model windows are shorter, so that it takes about a minute; but not shorter than SHORTEST, since edges keep the first
and the last 64 rows of a window in 16 bits, and what a format loses shows in the rows between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.cache.size import CacheSize
from octavo.calibrate import calibrate
from octavo.corpus import load_texts
from octavo.engine.reading import Reading
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.measure.accuracy.compare import compare
from octavo.measure.candidate import Candidate
from octavo.measure.doctor.advice import findings
from octavo.measure.doctor.diagnosis import Diagnosis
from octavo.measure.doctor.inspection import examine, keys, widths
from octavo.measure.doctor.selfcheck import self_check
from octavo.models.bind import BoundModel
from octavo.models.model import BUNDLED, Model
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat
from octavo.text_windows import consecutive_windows, self_windows, token_windows

SELF = "self"
PROSE = BUNDLED / "evaluation.txt"  # English, written for this project
CALIBRATED, MEASURED, LENGTH = 8, 2, 512  # windows of LENGTH tokens
SHORTEST, LAYER_TOKENS = 256, 128  # of a window, and of the piece of one that layers are tried on
CHARS = 400_000  # of a text that are looked at
SECONDS = 40.0  # what comparing the formats may take, about; and trying the layers half of that
LAST_BIT = "16 bits, last bit flipped"
CANDIDATES: tuple[
    tuple[str, str, bool, dict[str, Any]], ...
] = (  # name, format, whether the doctor's own calibration is used, granularity and headroom if not its own
    ("kv8", "kv8", True, {}),
    ("k8v4", "k8v4", True, {}),
    ("kv4", "kv4", True, {}),
    ("kv8, uncalibrated", "kv8", False, {}),
    ("k8v4, uncalibrated", "k8v4", False, {}),
    ("int8", "int8", True, {}),
    ("int8, tensor × 1.0", "int8", True, {"granularity": "tensor", "headroom": 1.0}),
)
# Codes alone; token formats without the calibration, which hides what is special in a layer.
LAYER_FORMATS = ("int8", "int8-token", "int4-token")


def diagnose(model: Model, text: str | None = None, progress: Callable[[float], None] | None = None) -> Diagnosis:
    """Examine a loaded model. `text` is a .txt or .jsonl file or a named set, `self` for text that the model writes, or
    None for a bundled English text; `progress` is called with the share of the work that is done."""
    start, bound = time.perf_counter(), model.bound
    report = progress or (lambda _: None)
    found = Diagnosis(model.name, True, weights=model.weight_kind, processor=model.processor, anatomy=examine(bound))
    found.self_check = self_check(bound)
    report(0.1)
    length = min(LENGTH, bound.max_context)
    found.text, calibration_windows, windows = _windows(model, text, length)
    begin = time.perf_counter()
    found.keys = keys(bound, calibration_windows[0])
    one = time.perf_counter() - begin  # forward of `length` tokens
    forwards = CALIBRATED + MEASURED * (len(CANDIDATES) + 2)
    whole, length = length, affordable(length, one * forwards, SECONDS, SHORTEST)
    calibration_windows, windows = [w[:length] for w in calibration_windows], [w[:length] for w in windows]
    report(0.2)
    calibration = calibrate(model, calibration_windows, dataset=found.text)
    found.widths = widths(calibration)
    found.calibrated, found.measured = (f"{len(w)} windows of {length} tokens" for w in (calibration_windows, windows))
    report(0.3)

    raw, sixteen = bound.raw_format, CacheSize.of(bound.shapes, KVFormat.parse("bf16"))
    candidates = [Candidate(LAST_BIT, raw, simulate=flip_last_bit)]
    for name, kv, own, choice in CANDIDATES:
        format = KVFormat.parse(kv)
        candidates.append(Candidate(name, format, calibration if own else None, **choice))
        found.sizes[name] = CacheSize.of(bound.shapes, format).token / sixteen.token
    scores = compare(
        model, Candidate(str(raw), raw), candidates, windows, lambda done: report(0.3 + 0.4 * done / len(windows))
    )
    found.rounding, found.formats = scores[1].kl, scores[2:]
    piece = min(length, LAYER_TOKENS)
    trials = one * piece / whole * (1 + len(LAYER_FORMATS) * len(bound.layers))
    window = windows[0][: affordable(piece, trials, SECONDS / 2, 32)]
    found.layers = sensitivity(bound, calibration, window, lambda share: report(0.7 + 0.3 * share))
    found.findings = findings(found)
    found.seconds = time.perf_counter() - start
    return found


def flip_last_bit(x: Tensor) -> Tensor:
    """K or V in 16 bits with the last bit the other way: what any rounding of a 16-bit cache may do."""
    short = x.contiguous() if x.dtype == torch.float16 else x.bfloat16().contiguous()
    return (short.view(torch.int16) ^ 1).view(short.dtype).to(x.dtype)


def sensitivity(
    bound: BoundModel, calibration: Calibration, window: Sequence[int], progress: Callable[[float], None]
) -> dict[str, list[float]]:
    """Mean KL, nats, over `window` with a single layer in each of LAYER_FORMATS and the others unquantized."""
    raw = bound.raw_format
    owners = [i for i, shape in enumerate(bound.shapes) if shape.shares is None]
    reference = _log_probabilities(Reading(bound), window)
    probabilities = reference.exp()
    found: dict[str, list[float]] = {}
    for nth, name in enumerate(LAYER_FORMATS):
        format = KVFormat.parse(name)
        kl = []
        for layer in owners:
            formats = [format if i == layer else raw for i in range(len(bound.layers))]
            reading = Reading(bound, formats, calibration if format.needs_calibration else None)
            own = _log_probabilities(reading, window)
            kl.append((probabilities * (reference - own)).sum(-1).mean().item())
            progress((nth + (len(kl) / len(owners))) / len(LAYER_FORMATS))
        found[name] = kl
    return found


def _log_probabilities(reading: Reading, window: Sequence[int]) -> Tensor:
    return torch.cat([logits.log_softmax(-1) for logits in reading.logits(window)])


def affordable(length: int, seconds: float, limit: float, shortest: int) -> int:
    """The longest windows, not below `shortest`, for which the work takes at most `limit` seconds, if it takes
    `seconds` with windows of `length` tokens."""
    while seconds > limit and length >= 2 * shortest:
        seconds, length = seconds / 2, length // 2
    return length


def _windows(model: Model, text: str | None, length: int) -> tuple[str, list[list[int]], list[list[int]]]:
    """The text's name, windows to calibrate on and windows to measure on: of its first part and of the rest."""
    count = CALIBRATED + MEASURED
    if model.synthetic:
        ids = model.bound.random_tokens(count, length)
        return "random tokens, since the weights are random too", ids[:CALIBRATED], ids[CALIBRATED:]
    if text == SELF:
        windows = self_windows(
            LLM(model, session_len=min(length + 1, model.bound.max_context), max_batch_size=count), count, length
        )
        return "text that the model wrote", windows[:CALIBRATED], windows[CALIBRATED:]
    texts = load_texts(text or str(PROSE))
    whole = "\n\n".join(texts)[:CHARS]
    tokens = len(model.tokenizer(whole, verbose=False)["input_ids"])
    needed = 2 * count * length
    if tokens < needed:
        raise OctavoError(f"{texts.name} has {tokens:,} tokens and the doctor needs {needed:,}: name a longer --text")
    cut = len(whole) * 3 // 5
    return (
        Path(texts.name).name,
        token_windows([whole[:cut]], model.tokenizer, CALIBRATED, length),
        consecutive_windows([whole[cut:]], model.tokenizer, length, MEASURED),
    )
