"""Everything about a model's cache on one page: what it saves, what it costs, where the numbers lie, how fast it is.

`gather` measures, through the functions of the other verbs, in sizes that take about a minute on a small model; the
templates in data/report say it in words. A directory then holds a page that needs nothing beside itself (report.html),
the same as Markdown with its plots as files, and the numbers as JSON.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from octavo.cache.size import format_bytes
from octavo.calibrate import calibrate
from octavo.errors import OctavoError
from octavo.measure import machine, plots, svg
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
from octavo.quant.format import RAW_NAMES, KVFormat
from octavo.windows import consecutive_windows, token_windows
from octavo.corpus import load_texts

FORMATS = ("int8", "int8-token", "k8v4", "int4-token")  # beside the model's 16 bits
TIMED = ("int8", "int8-token")
WINDOW, WINDOWS = 1024, 6  # tokens, and windows that formats are compared on
SAMPLES, SEQLEN = 16, 512  # of a calibration of the report's own
BATCH_SIZES, CONTEXT, TOKENS, ROUNDS = (1, 4, 16), 512, 16, 2  # of the timings

NBSP, MINUS = "\u00a0", "\u2212"

Progress = Callable[[str, float], None]  # what is being done, and the share of it all that is done


@dataclass
class Report:
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
        about = {"calibration": asdict(self.calibration.header), "diagnosis": self.diagnosis.document()}
        return {"command": "report", **found, **plain, **about}


def write_report(
    model: Model,
    directory: Path,
    *,
    calibration: Path | Calibration | None = None,
    text: str | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure `model` and write report.html, report.md with its plots, and report.json into `directory`.

    `calibration` is taken where there is one, here or beside the model, else made from the first part of `text`: a
    file, a named set, or a bundled English text if None. Sessions are counted in `memory` bytes, by default the
    machine's. Raises OctavoError, before the work, where nothing can be written or matplotlib is missing.
    """
    svg.require_matplotlib()
    try:
        (directory / "plots").mkdir(parents=True, exist_ok=True)
        (directory / "report.json").touch()
    except OSError as error:
        raise OctavoError(f"nothing can be written in {directory} ({error.strerror}): name another --out") from None
    found = gather(model, calibration, text, memory, progress or (lambda *_: None))
    render(found, directory)
    return found


def render(found: Report, directory: Path) -> None:
    """Write the page, the Markdown file with its plots, and the numbers."""
    figures = draw(found)
    for name, (figure, _) in figures.items():
        (directory / "plots" / f"{name}.svg").write_text(svg.standalone(figure, name), encoding="utf-8")
    inline = {name: svg.inline(figure, name, title) for name, (figure, title) in figures.items()}
    style = (files("octavo") / "data/report/report.css").read_text(encoding="utf-8")
    environment = _environment()
    for name, more in (("report.html", {"figures": inline, "style": style}), ("report.md", {"figures": figures})):
        page = environment.get_template(name).render(r=found, **more)
        (directory / name).write_text(page, encoding="utf-8")
    (directory / "report.json").write_text(json.dumps(found.document(), indent=1) + "\n", encoding="utf-8")


def gather(
    model: Model, given: Path | Calibration | None, text: str | None, memory: int | None, progress: Progress
) -> Report:
    start, bound = time.perf_counter(), model.bound
    progress("examining the model", 0)
    diagnosis = diagnose(model, text, lambda share: progress("examining the model", 0.2 * share))

    raw = KVFormat.parse(RAW_NAMES[str(bound.dtype)[6:]])
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
    timed = [str(raw), *TIMED]
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
        calibration=calibration,
        progress=lambda done: progress("timing", 0.5 + 0.5 * done / runs),
    )
    return Report(
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


def draw(found: Report) -> dict[str, tuple[Any, str]]:
    """Name → figure and what it shows."""
    widths = {side: [layer[side]["max"] - layer[side]["min"] for layer in found.calibration.layers] for side in "kv"}
    lines = [
        (score.name, [(b.start + b.stop) / 2 for b in score.kl_by_bin], [max(b.kl, 1e-9) for b in score.kl_by_bin])
        for score in found.scores[1:]
    ]
    diagnosis = found.diagnosis
    return {
        "growth": (plots.growth(found.fits, found.memory), "Memory over the number of sessions"),
        "kl-position": (plots.kl_by_position(lines, diagnosis.rounding), "KL divergence by position in the window"),
        "kl-layer": (
            plots.kl_by_layer([own.layer for own in diagnosis.keys], diagnosis.layers),
            "KL divergence with one layer quantized",
        ),
        "ranges-k": (plots.ranges(widths["k"]), "Width of each channel of K, by layer"),
        "ranges-v": (plots.ranges(widths["v"]), "Width of each channel of V, by layer"),
        "saturation": (plots.saturation(found.clipped), "Share of values clipped, by layer"),
        "decode": (plots.decode(found.speed, found.theory), "Decode speed over the number of sessions"),
        "latency": (plots.latency(found.speed), "Time per token over the number of sessions"),
    }


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("octavo", "data/report"),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    found.filters |= {"sci": scientific, "bytes": format_bytes, "machine": machine.sentence, "prose": prose}
    found.filters["signed"] = lambda x: f"{x:+.2f}".replace("-", MINUS)
    return found


def scientific(x: float) -> Markup:
    """2.6e-04 → '2.6 × 10<sup>−4</sup>', which Markdown reads too."""
    if x == 0 or not math.isfinite(x):
        return Markup("0" if x == 0 else "–")
    digits, _, exponent = f"{x:.1e}".partition("e")
    return Markup(f"{digits} × 10<sup>{int(exponent)}</sup>".replace(" ", NBSP).replace("-", MINUS))


def prose(text: str) -> Markup:
    """A finding's words for the page: commands and options as code, numbers as people write them."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    marked = re.sub(r"(--[\w-]+(?: int\d[\w-]*| k\dv\d)?)(?![^<]*</code>)", r"<code>\1</code>", marked)
    return Markup(re.sub(r"\b(\d(?:\.\d)?)e-0?(\d+)\b", rf"\1{NBSP}×{NBSP}10<sup>{MINUS}\2</sup>", marked))
