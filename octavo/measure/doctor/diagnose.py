"""Will this model work, and will its cache quantize well? Everything here is measured on the model itself, in a time
that the user gives.

    anatomy      geometry, positions, key offsets and wide channels      inspection.py
    self-check   packed = alone = transformers                           selfcheck.py
    formats      KL of every format on text                              here, through accuracy/compare.py
    layers       KL with a single layer in a format                      here, through the same
    findings     what follows from it, in words                          advice.py

A slow model sees fewer windows and shorter ones, but none shorter than LEAST: edges keep the first and the last 64 rows
of a window in 16 bits, and what a format loses shows in the rows between. Layers are tried with the time that is left.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from octavo.cache.size import CacheSize
from octavo.calibrate import calibrate
from octavo.corpus import load_texts
from octavo.engine.reading import Reading
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.measure.accuracy.compare import compare, losses
from octavo.measure.budget import NO_LIMIT, Budget, Windows, duration
from octavo.measure.candidate import Candidate
from octavo.measure.doctor.advice import findings
from octavo.measure.doctor.diagnosis import Diagnosis
from octavo.measure.doctor.inspection import examine, keys, widths
from octavo.measure.doctor.selfcheck import self_check
from octavo.measure.pace import Pace
from octavo.models.bind import BoundModel
from octavo.models.model import Model
from octavo.progress import Progress, silent
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat
from octavo.text_windows import consecutive_windows, self_windows, token_windows

WANTED, LEAST = Windows(8, 512), Windows(4, 256)  # that formats are measured on
CALIBRATED = 8  # windows of the same length
SELF = "self"  # in place of a text's name: the model writes
CHARS = 400_000  # of a text that are looked at
TOKENS, FEWEST = 128, 32  # of the piece of a window that layers are tried on
# Codes alone; token formats without the calibration, which hides what is special in a layer.
LAYER_FORMATS = ("int8", "int8-token", "int4-token")
LAST_BIT = "16 bits, last bit flipped"
CANDIDATES = (  # name, format, whether the doctor's own calibration is used
    ("kv8", "kv8", True),
    ("kv8, uncalibrated", "kv8", False),
    ("k8v4", "k8v4", True),
    ("kv4", "kv4", True),
    ("int8", "int8", True),
)


def diagnose(
    model: Model,
    text: str | None = None,
    budget: Budget = NO_LIMIT,
    tell: Progress = silent,
    say: Callable[[str], None] = silent,
) -> Diagnosis:
    """Examine a loaded model. `text` is a .txt or .jsonl file or a named set, `self` for text that the model writes, or
    None for a bundled English text. `tell` is called with what is done, how much of it, and of how much; `say` with
    what will be measured, and what was left out to fit the budget."""
    start, bound = perf_counter(), model.bound
    bound.expect_rows()
    found = Diagnosis(model.name, True, weights=model.weight_kind, processor=model.processor, slower=bound.slower)
    found.anatomy = examine(bound)
    tell("checking that sequences do not mix", 0, 0)
    found.self_check = self_check(bound)
    pace = Pace.measure(bound, WANTED.length)
    forwards = len(CANDIDATES) + 2

    def seconds(size: Windows) -> float:
        written = pace.write(CALIBRATED + size.count, size.length) if text == SELF else 0.0
        return written + pace.read(CALIBRATED * size.length) + forwards * pace.read(size.tokens, logits=True)

    wanted = Windows(WANTED.count, min(WANTED.length, bound.max_context))
    fit = budget.less(perf_counter() - start).fit(wanted, LEAST, seconds)
    say(f"measuring on {fit.of(forwards)}")
    found.text, calibration_windows, measured = windows(model, text, CALIBRATED, fit.size)
    found.keys = keys(bound, calibration_windows[0])

    told = partial(tell, "calibrating")
    calibration = calibrate(model, calibration_windows, dataset=found.text, progress=told)
    found.widths = widths(calibration)
    found.calibrated = f"{len(calibration_windows)} windows of {fit.size.length} tokens"
    raw, sixteen = bound.raw_format, CacheSize.of(bound.shapes, KVFormat.parse("bf16"))
    candidates = [Candidate(str(raw), raw), Candidate(LAST_BIT, raw, simulate=flip_last_bit)]
    for name, kv, own in CANDIDATES:
        format = KVFormat.parse(kv)
        candidates.append(Candidate(name, format, calibration if own else None))
        found.sizes[name] = CacheSize.of(bound.shapes, format).token / sixteen.token
    scores = compare(
        model,
        candidates,
        measured,
        partial(tell, "comparing formats"),
        lambda done: done >= LEAST.count and budget.over(start),
    )
    found.rounding, found.formats = scores[1].kl, scores[2:]
    found.measured = f"{scores[0].tokens // (fit.size.length - 1)} windows of {fit.size.length} tokens"
    left = budget.less(perf_counter() - start)
    found.layers = try_layers(bound, calibration, measured[0], pace, left, tell, say)
    found.findings = findings(found)
    found.seconds = perf_counter() - start
    return found


def flip_last_bit(x: Tensor) -> Tensor:
    """K or V in 16 bits with the last bit the other way: what any rounding of a 16-bit cache may do."""
    short = x.contiguous() if x.dtype == torch.float16 else x.bfloat16().contiguous()
    return (short.view(torch.int16) ^ 1).view(short.dtype).to(x.dtype)


def windows(
    model: Model, text: str | None, calibrated: int, size: Windows
) -> tuple[str, list[list[int]], list[list[int]]]:
    """The text's name, `calibrated` windows of its first part to calibrate on, and of the rest those to measure on.
    Raises OctavoError for a text that is too short for them."""
    measured, length = size.count, size.length
    total = calibrated + measured
    if model.synthetic:
        ids = model.bound.random_tokens(total, length)
        return "random tokens, since the weights are random too", ids[:calibrated], ids[calibrated:]
    if text == SELF:
        written = self_windows(
            LLM(model, session_len=min(length + 1, model.bound.max_context), max_batch_size=total), total, length
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


def try_layers(
    bound: BoundModel,
    calibration: Calibration,
    window: Sequence[int],
    pace: Pace,
    budget: Budget,
    tell: Progress,
    say: Callable[[str], None],
) -> dict[str, list[float]]:
    """Mean KL, nats, with a single layer in each of LAYER_FORMATS, on as much of `window` as the budget allows; nothing
    where that is not worth while."""
    raw = bound.raw_format
    owners = [i for i, shape in enumerate(bound.shapes) if shape.shares is None]
    trials = len(LAYER_FORMATS) * len(owners)
    fit = budget.fit(
        Windows(1, min(len(window), TOKENS)),
        Windows(1, FEWEST),
        lambda size: (1 + trials) * pace.read(size.tokens, logits=True),
    )
    if not budget.holds(fit.seconds):
        say(f"layers are not tried one by one: that takes {duration(fit.seconds)} more; give a longer --budget")
        return {}
    readings = []
    for format in map(KVFormat.parse, LAYER_FORMATS):
        own = calibration if format.needs_calibration else None
        for layer in owners:
            formats = [format if i == layer else raw for i in range(len(bound.layers))]
            readings.append(Reading(bound, formats, own))
    done = count()  # 0 is the reading that the others are compared with
    kl = list(losses(readings, window[: fit.size.length], lambda: tell("trying layers", next(done), trials)))
    return {name: kl[i * len(owners) : (i + 1) * len(owners)] for i, name in enumerate(LAYER_FORMATS)}
