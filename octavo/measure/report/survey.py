"""Everything about a model's cache in one go: what a report shows, measured by the functions of the other verbs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo.calibrate import calibrate
from octavo.corpus import load_texts
from octavo.devices import device_of
from octavo.measure import machine
from octavo.measure.accuracy.clipping import Shares, saturation
from octavo.measure.accuracy.compare import Score, compare
from octavo.measure.accuracy.retrieval import LEAST, Retrieval, contexts, retrieve
from octavo.measure.budget import NO_LIMIT, Budget
from octavo.measure.candidate import Candidate, beside, check_pair
from octavo.measure.doctor.diagnose import PROSE, diagnose
from octavo.measure.doctor.diagnosis import Diagnosis
from octavo.measure.memory.costs import INT4, Cost, costs
from octavo.measure.memory.plan import Fit, fits
from octavo.measure.pace import Pace
from octavo.measure.report.combinations import Corner, measure_corners
from octavo.measure.report.sizes import COMPARED, DOCTOR, ROUNDS, TOKENS, choose
from octavo.measure.speed.roofline import Ceiling, bandwidth, ceilings
from octavo.measure.speed.throughput import Speed, measure, prompt_length
from octavo.models.geometry import Geometry
from octavo.models.model import Model
from octavo.progress import Share
from octavo.quant.calibration import Calibration
from octavo.quant.format import ADVISED, KVFormat
from octavo.text_windows import consecutive_windows, token_windows

TIMED = ("kv8", "kv4")
CHARS = 8  # of a token, at most


@dataclass
class Survey:
    """All that was measured or computed."""

    model: str
    fingerprint: str
    machine: dict[str, Any]
    seconds: float
    diagnosis: Diagnosis
    calibration: Calibration
    own_calibration: bool  # one was made for the report, from the first part of the text
    text: str
    windows: int
    window: int
    scores: list[Score]  # the baseline first
    long: list[Score]  # on one window of a long context
    retrieval: list[Retrieval]  # values looked up in a list of that length; none where it is short
    memory: int  # bytes that sessions are counted in
    context: int  # of these sessions
    costs: list[Cost]
    corners: list[Corner]  # 16-bit weights first
    sixteen_bit: str | None  # the model that they were measured with; None: computed alone
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

    @property
    def corners_command(self) -> str:
        """What measures the corners that were computed alone."""
        four, sixteen = (self.model, "MODEL16") if self.diagnosis.weights == INT4 else ("DIR", self.model)
        return f"octavo report {four} --baseline {sixteen}"

    @property
    def fits(self) -> list[Fit]:
        return [corner.fit for corner in self.corners]

    def document(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        found = {name: value for name, value in vars(self).items() if name not in ("calibration", "diagnosis")}
        parts = ("scores", "long", "retrieval", "theory", "speed")
        plain = {name: [asdict(row) for row in found[name]] for name in parts}
        for score in plain["scores"] + plain["long"]:
            del score["kl_by_position"], score["cache_alone"]  # kl_by_bin is the same, and short; the weights are
        plain["costs"] = [cost.document() for cost in self.costs]
        plain["corners"] = [corner.document() for corner in self.corners]
        about = {"calibration": asdict(self.calibration.header), "diagnosis": self.diagnosis.document()}
        return {"command": "report", **found, **plain, **about}


def gather(
    model: Model,
    given: Path | Calibration | None,
    text: str | None,
    memory: int | None,
    sixteen: Model | None,
    tell: Share,
    budget: Budget = NO_LIMIT,
    say: Callable[[str], None] = lambda _: None,
) -> Survey:
    """Measure `model`, and with `sixteen` the corners; the rest is as in `octavo.measure.report.page.write_report`."""
    if sixteen is not None:
        check_pair(sixteen, model)
    start, bound, models = time.perf_counter(), model.bound, [model] if sixteen is None else [model, sixteen]
    without_corners = 1 / len(models)  # the share of it all

    def progress(what: str, share: float) -> None:
        tell(what, without_corners * share)

    progress("examining the model", 0)
    raw, budget = bound.raw_format, budget.part(without_corners)
    formats = [raw, *map(KVFormat.parse, ADVISED)]
    pace = Pace.measure(bound, COMPARED.length)
    sizes = choose(pace, budget, len(formats), 1 + len(TIMED), bound.max_context)
    say(str(sizes))
    diagnosis = diagnose(model, text, budget.part(DOCTOR), lambda what, *_: progress(what, 0.1), say)

    found = [m.calibration(given if m is model else None, KVFormat.parse("kv8")) for m in models]
    texts = load_texts(text or str(PROSE))
    whole = "\n\n".join(texts)
    own = None in found
    cut = len(whole) * 3 // 5 if own else 0
    progress("calibrating", 0.2)
    drawn, dataset = sizes.calibrated.size, f"{texts.name}, its first part"
    samples = token_windows([whole[:cut]], model.tokenizer, drawn.count, drawn.length) if own else []
    calibrations = [c or calibrate(m, samples, dataset=dataset) for m, c in zip(models, found, strict=True)]
    calibration = calibrations[0]
    window, length = sizes.compared.size.length, sizes.long.size.length
    windows = consecutive_windows([whole[cut:]], model.tokenizer, window, sizes.compared.size.count)

    def comparing(done: int, total: int) -> None:
        progress("comparing formats", 0.25 + 0.1 * done / total)

    candidates = [Candidate(str(f), f, model.calibration(calibration, f)) for f in formats]
    scores = compare(model, candidates[0], candidates[1:], windows, comparing)
    rest = whole[cut:][: CHARS * length]  # of a short text all there is
    length = min(length, len(model.tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]))
    whole_context = consecutive_windows([rest], model.tokenizer, length, 1)
    progress("reading a long context", 0.35)
    long = compare(model, candidates[0], candidates[1:], whole_context)
    progress("looking up values", 0.4)
    asked = contexts(model.tokenizer, length) if length >= LEAST else []
    looked_up = retrieve(model, candidates[0], candidates[1:], asked, length) if asked else []
    headrooms = dict.fromkeys((1.0, calibration.header.headroom))
    clipped = saturation(bound, calibration, windows, list(headrooms))

    geometry = Geometry.trace(model.path, str(bound.dtype)[6:])
    memory = memory or device_of(bound.device).memory()
    context = min(bound.max_context, 1 << 17)

    progress("measuring bandwidth", 0.5)
    rate = bandwidth(bound.device)
    timed = [candidate for candidate in candidates if candidate.name in (str(raw), *TIMED)]
    speed_context = sizes.context
    batch_sizes = [size for size in sizes.batch_sizes if prompt_length(size, speed_context, TOKENS) > 0]
    theory = ceilings(bound, timed, batch_sizes, [speed_context], TOKENS, rate)
    runs = len(theory) * ROUNDS
    speed = measure(
        model,
        timed,
        batch_sizes,
        [speed_context],
        theory,
        tokens=TOKENS,
        rounds=ROUNDS,
        progress=lambda done: progress("timing", 0.5 + 0.5 * done / runs),
    )
    corners = [Corner(fit) for fit in fits(geometry, formats[:2], context, memory)]
    if sixteen is not None:
        corners = measure_corners(
            model,
            beside(sixteen, model, candidates[:2], calibrations[1]),
            [corner.fit for corner in corners],
            windows,
            speed_context,
            rate,
            tokens=TOKENS,
            rounds=ROUNDS,
            progress=lambda what, share: tell(what, without_corners + (1 - without_corners) * share),
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
        long=long,
        retrieval=looked_up,
        memory=memory,
        context=context,
        costs=costs(geometry, formats, context, memory),
        corners=corners,
        sixteen_bit=sixteen.name if sixteen is not None else None,
        clipped=clipped,
        bandwidth=rate,
        theory=theory,
        speed=speed,
        speed_context=speed_context,
    )
