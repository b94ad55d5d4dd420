"""Everything about a model's cache in one go: what a report shows, measured by the functions of the other verbs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo.calibrate import calibrate
from octavo.corpus import load_texts
from octavo.devices import device_of
from octavo.measure import machine
from octavo.measure.accuracy.clipping import Shares, saturation
from octavo.measure.accuracy.compare import Score, compare
from octavo.measure.accuracy.retrieval import LEAST, Retrieval, make_context, retrieve
from octavo.measure.budget import NO_LIMIT, Budget, Windows
from octavo.measure.candidate import Candidate, beside, check_pair
from octavo.measure.doctor.diagnose import diagnose
from octavo.measure.doctor.diagnosis import Diagnosis
from octavo.measure.memory.costs import INT4, Cost, costs, weight_kinds
from octavo.measure.pace import Pace
from octavo.measure.report.combinations import Corner, measure_corners, timed
from octavo.measure.report.sizes import COMPARED, DOCTOR, choose
from octavo.measure.speed.roofline import Ceiling, bandwidth
from octavo.measure.speed.throughput import Speed
from octavo.models.geometry import Geometry
from octavo.models.model import Model
from octavo.progress import Share, silent, within
from octavo.quant.calibration import Calibration
from octavo.quant.format import ADVISED, KVFormat, dtype_name
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

    def document(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        found = {name: value for name, value in vars(self).items() if name not in ("calibration", "diagnosis")}
        plain = {name: [asdict(row) for row in found[name]] for name in ("retrieval", "theory", "speed")}
        for name in ("scores", "long"):
            plain[name] = [score.document("cache_alone") for score in found[name]]  # the weights are the same
        plain["costs"] = [cost.document() for cost in self.costs]
        plain["corners"] = [corner.document() for corner in self.corners]
        about = {"calibration": asdict(self.calibration.header), "diagnosis": self.diagnosis.document()}
        return {"command": "report", **found, **plain, **about}


def gather(
    model: Model,
    given: Path | Calibration | None = None,
    text: str | None = None,
    memory: int | None = None,
    sixteen: Model | None = None,
    tell: Share = silent,
    budget: Budget = NO_LIMIT,
    say: Callable[[str], None] = silent,
) -> Survey:
    """Measure `model`.

    Its calibration is the `given` one, that beside the model, or one made from the first part of `text`: a file, a
    named set, or a bundled English text if None. Sessions are counted in `memory` bytes, by default the
    machine's. With `sixteen`, the same model with 16-bit weights where `model` has 4-bit ones, the four corners are
    measured; it takes its own calibration, or one made like that of `model`. `say` is told what fits the `budget` and
    is measured. Raises OctavoError, before the work, where the two are no such pair.
    """
    if sixteen is not None:
        check_pair(sixteen, model)
    start, bound, models = time.perf_counter(), model.bound, [model] if sixteen is None else [model, sixteen]
    without_corners = 1 / len(models)  # the share of it all

    def progress(what: str, share: float) -> None:
        tell(what, without_corners * share)

    progress("examining the model", 0)
    raw, budget = bound.raw_format, budget.part(without_corners)
    formats, pace = [raw, *map(KVFormat.parse, ADVISED)], Pace.measure(bound, COMPARED.length)
    sizes = choose(pace, budget, len(formats), 1 + len(TIMED), bound.max_context)
    say(str(sizes))
    diagnosis = diagnose(model, text, budget.part(DOCTOR), lambda what, *_: progress(what, 0.1), say)

    progress("calibrating", 0.2)
    found = [m.calibration(given if m is model else None, KVFormat.parse("kv8")) for m in models]
    texts = load_texts(text)
    first, rest = _parts("\n\n".join(texts), None in found)
    calibrations = _calibrations(models, found, first, f"{texts.name}, its first part", sizes.calibrated.size)
    calibration, size = calibrations[0], sizes.compared.size
    candidates = [Candidate(str(f), f, model.calibration(calibration, f)) for f in formats]
    windows = consecutive_windows([rest], model.tokenizer, size.length, size.count)
    scores = compare(model, candidates, windows, within(progress, "comparing formats", 0.25, 0.1))
    long, looked_up = _long(model, candidates, rest, sizes.long.size.length, progress)
    clipped = saturation(bound, calibration, windows, list(dict.fromkeys((1.0, calibration.header.headroom))))

    progress("measuring bandwidth", 0.5)
    rate = bandwidth(bound.device)
    some = [candidate for candidate in candidates if candidate.name in (str(raw), *TIMED)]
    tell_time = within(progress, "timing", 0.5, 0.5)
    theory, speed = timed(model, some, sizes.batch_sizes, sizes.context, rate, tell_time)
    geometry = Geometry.trace(model.path, dtype_name(bound.dtype))
    memory, context = memory or device_of(bound.device).memory(), min(bound.max_context, 1 << 17)
    computed = costs(geometry, formats[:2], context, memory, list(weight_kinds(geometry)))
    corners = [Corner(cost) for cost in computed]
    if sixteen is not None:
        corners = measure_corners(
            model,
            beside(sixteen, model, candidates[:2], calibrations[1]),
            computed,
            windows,
            sizes.context,
            rate,
            lambda what, share: tell(what, without_corners + (1 - without_corners) * share),
        )
    return Survey(
        model=model.name,
        fingerprint=model.fingerprint,
        machine=machine.describe(bound.device),
        seconds=time.perf_counter() - start,
        diagnosis=diagnosis,
        calibration=calibration,
        own_calibration=bool(first),
        text=texts.name,
        windows=len(windows),
        window=size.length,
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
        speed_context=sizes.context,
    )


def _parts(whole: str, calibrates: bool) -> tuple[str, str]:
    """What a calibration is made from, if one is, and what is measured on."""
    cut = len(whole) * 3 // 5 if calibrates else 0
    return whole[:cut], whole[cut:]


def _calibrations(
    models: Sequence[Model], found: Sequence[Calibration | None], text: str, name: str, size: Windows
) -> list[Calibration]:
    """Each model's own, or one made from the text. The models have one tokenizer."""
    windows = token_windows([text], models[0].tokenizer, size.count, size.length) if text else []
    return [own or calibrate(model, windows, dataset=name) for model, own in zip(models, found, strict=True)]


def _long(
    model: Model, candidates: Sequence[Candidate], text: str, length: int, progress: Share
) -> tuple[list[Score], list[Retrieval]]:
    """The formats on one window of `length` tokens, or of all there are, and looking up values in a list that is as
    long."""
    progress("reading a long context", 0.35)
    text = text[: CHARS * length]
    length = min(length, len(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
    scores = compare(model, candidates, consecutive_windows([text], model.tokenizer, length, 1))
    progress("looking up values", 0.4)
    asked = make_context(model.tokenizer, length) if length >= LEAST else None
    return scores, retrieve(model, candidates, asked, length) if asked else []
