"""Everything about a model's cache in one go: what a report shows, measured by the functions of the other verbs.

Sizes are chosen so that all of it takes about a minute on a small model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo.calibrate import calibrate
from octavo.corpus import load_texts
from octavo.measure import machine
from octavo.measure.accuracy import Candidate, Score, compare
from octavo.measure.ceiling import Ceiling, bandwidth, ceilings
from octavo.measure.diagnosis import Diagnosis
from octavo.measure.doctor import PROSE, diagnose
from octavo.measure.memory import Cost, costs, device_memory
from octavo.measure.plan import Fit, fits
from octavo.measure.saturation import Shares, saturation
from octavo.measure.speed import Speed, measure, prompt_length
from octavo.models.geometry import Geometry
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.quant.format import KVFormat
from octavo.windows import consecutive_windows, token_windows

FORMATS = ("int8", "int8-token", "k8v4", "int4-token")  # beside the model's 16 bits
TIMED = ("int8", "int8-token")
WINDOW, WINDOWS = 1024, 6  # tokens, and windows that formats are compared on
SAMPLES, SEQLEN = 16, 512  # of a calibration of the report's own
BATCH_SIZES, CONTEXT, TOKENS, ROUNDS = (1, 4, 16), 512, 16, 2  # of the timings

Progress = Callable[[str, float], None]  # what is being done, and the share of it all that is done


@dataclass
class Survey:
    """All that was measured or computed."""

    model: str
    fingerprint: str
    machine: dict[str, Any]
    seconds: float
    diagnosis: Diagnosis
    calibration: Calibration
    own_calibration: bool  # made for the report, from the first part of the text
    text: str
    windows: int
    window: int
    scores: list[Score]  # the baseline first
    memory: int  # bytes that sessions are counted in
    context: int  # of these sessions
    costs: list[Cost]
    fits: list[Fit]
    clipped: Shares
    bandwidth: float
    theory: list[Ceiling]
    speed: list[Speed]
    speed_context: int

    @property
    def title(self) -> str:
        """The model's name without the path to it; a Hub id stays whole."""
        return Path(self.model).name if Path(self.model).exists() else self.model

    @property
    def baseline(self) -> str:
        return self.scores[0].name

    def document(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        found = {name: value for name, value in vars(self).items() if name not in ("calibration", "diagnosis")}
        plain = {name: [asdict(row) for row in found[name]] for name in ("scores", "costs", "fits", "theory", "speed")}
        for score in plain["scores"]:
            del score["kl_by_position"]  # kl_by_bin is the same, and short
        about = {"calibration": asdict(self.calibration.header), "diagnosis": self.diagnosis.document()}
        return {"command": "report", **found, **plain, **about}


def gather(
    model: Model, given: Path | Calibration | None, text: str | None, memory: int | None, progress: Progress
) -> Survey:
    """Measure `model`; `given`, `text` and `memory` are as in `octavo.measure.report.write_report`."""
    start, bound = time.perf_counter(), model.bound
    progress("examining the model", 0)
    diagnosis = diagnose(model, text, lambda share: progress("examining the model", 0.2 * share))

    raw = bound.raw_format
    calibration = model.calibration(given, KVFormat.parse("int8-token"))
    texts = load_texts(text or str(PROSE))
    whole = "\n\n".join(texts)
    cut = 0 if calibration is not None else len(whole) * 3 // 5
    progress("calibrating", 0.2)
    own = calibration is None
    if calibration is None:
        seqlen = min(SEQLEN, bound.max_context)
        samples = token_windows([whole[:cut]], model.tokenizer, SAMPLES, seqlen)
        calibration = calibrate(model, samples, dataset=f"{texts.name}, its first part")
    window = min(WINDOW, bound.max_context)
    windows = consecutive_windows([whole[cut:]], model.tokenizer, window, WINDOWS)

    def comparing(done: int) -> None:
        progress("comparing formats", 0.25 + 0.25 * done / len(windows))

    names = [str(raw), *FORMATS]
    candidates = [Candidate(name, KVFormat.parse(name), calibration) for name in names]
    scores = compare(model, candidates[0], candidates[1:], windows, comparing)
    headrooms = dict.fromkeys((1.0, calibration.header.headroom))
    clipped = saturation(bound, calibration, windows, list(headrooms))

    geometry = Geometry.trace(model.path, str(bound.dtype)[6:])
    memory = memory or device_memory(bound.device)
    context = min(bound.max_context, 1 << 17)
    parsed = [KVFormat.parse(name) for name in names]

    progress("measuring bandwidth", 0.5)
    rate = bandwidth(bound.device)
    timed = [candidate for candidate in candidates if candidate.name in (str(raw), *TIMED)]
    speed_context = min(CONTEXT, bound.max_context)
    sizes = [size for size in BATCH_SIZES if prompt_length(size, speed_context, TOKENS) > 0]
    theory = ceilings(bound, timed, sizes, [speed_context], TOKENS, rate)
    runs = len(theory) * ROUNDS
    speed = measure(
        model,
        timed,
        sizes,
        [speed_context],
        theory,
        tokens=TOKENS,
        rounds=ROUNDS,
        progress=lambda done: progress("timing", 0.5 + 0.5 * done / runs),
    )
    return Survey(
        model=model.name,
        fingerprint=model.fingerprint,
        machine=machine.describe(bound.device),
        seconds=time.perf_counter() - start,
        diagnosis=diagnosis,
        calibration=calibration,
        own_calibration=own,
        text=texts.name,
        windows=len(windows),
        window=window,
        scores=scores,
        memory=memory,
        context=context,
        costs=costs(geometry, parsed, context, memory),
        fits=fits(geometry, parsed[:2], context, memory),
        clipped=clipped,
        bandwidth=rate,
        theory=theory,
        speed=speed,
        speed_context=speed_context,
    )
