"""Everything about a model's cache on one page: what it saves, what it costs, where the numbers lie, how fast it is.

The templates in data/report say in words what survey.py measures. A directory then holds a page that needs nothing
beside itself (report.html), the same as Markdown with its plots as files, and the numbers as JSON.
"""

import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from octavo.measure import machine
from octavo.measure.as_json import dumps
from octavo.measure.report import plots, svg
from octavo.measure.report.survey import Survey
from octavo.units import format_bytes

RETRIEVAL = "Values found, by where in the context they stand"
NBSP, MINUS = "\u00a0", "\u2212"


def render(found: Survey, directory: Path) -> None:
    """Write report.html, report.md with its plots, and report.json into a directory that can be written."""
    figures = draw(found)
    drawn = {name: svg.drawn(figure, name) for name, (figure, _) in figures.items()}
    for name, text in drawn.items():
        (directory / "plots" / f"{name}.svg").write_text(svg.standalone(text), encoding="utf-8")
    inline = {name: svg.inline(drawn[name], name, title) for name, (_, title) in figures.items()}
    style = (files("octavo") / "data/report/report.css").read_text(encoding="utf-8")
    environment = _environment()
    for name, more in (("report.html", {"figures": inline, "style": style}), ("report.md", {"figures": figures})):
        page = environment.get_template(name).render(r=found, **more)
        (directory / name).write_text(page, encoding="utf-8")
    (directory / "report.json").write_text(dumps(found.document()) + "\n", encoding="utf-8")


def draw(found: Survey) -> dict[str, tuple[Any, str]]:
    """Name → figure and what it shows."""
    widths = {side: [layer[side]["max"] - layer[side]["min"] for layer in found.calibration.layers] for side in "kv"}
    lines, long = (
        [
            (score.name, [(b.start + b.stop) / 2 for b in score.kl_by_bin], [max(b.kl, 1e-9) for b in score.kl_by_bin])
            for score in scores[1:]
        ]
        for scores in (found.scores, found.long)
    )
    diagnosis, corners = found.diagnosis, [corner.cost for corner in found.corners]
    return {
        "growth": (plots.growth(corners, found.memory), "Memory over the number of sessions"),
        "kl-position": (plots.kl_by_position(lines, diagnosis.rounding), "KL divergence by position in the window"),
        "kl-long": (plots.kl_by_position(long, diagnosis.rounding), "KL divergence by position in a long context"),
        **({"retrieval": (plots.retrieval(found.retrieval), RETRIEVAL)} if found.retrieval else {}),
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
    found.filters |= {
        "sci": scientific,
        "bytes": format_bytes,
        "machine": machine.sentence,
        "numbers": numbers,
        "prose": prose,
    }
    found.filters["signed"] = lambda x: f"{x:+.2f}".replace("-", MINUS)
    found.filters["change"] = lambda x: f"{x:+.5f}".replace("-", MINUS)
    found.filters["error"] = lambda x, digits: "" if math.isnan(x) else f"± {x:.{digits}f}"  # one window has none
    return found


def scientific(x: float) -> Markup:
    """2.6e-04 → '2.6 × 10<sup>−4</sup>', which Markdown reads too."""
    if x == 0 or not math.isfinite(x):
        return Markup("0" if x == 0 else "–")
    digits, _, exponent = f"{x:.1e}".partition("e")
    return Markup(f"{digits} × 10<sup>{int(exponent)}</sup>".replace(" ", NBSP).replace("-", MINUS))


def numbers(text: str) -> Markup:
    """6.9e-03 in a text as people write it."""
    return Markup(re.sub(r"\b(\d(?:\.\d)?)e-0?(\d+)\b", rf"\1{NBSP}×{NBSP}10<sup>{MINUS}\2</sup>", text))


def prose(text: str) -> Markup:
    """A finding's words for the page: commands and options as code, and `numbers`."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return numbers(re.sub(r"(--[\w-]+(?: int\d[\w-]*| kv?\d(?:v\d)?)?)(?![^<]*</code>)", r"<code>\1</code>", marked))
