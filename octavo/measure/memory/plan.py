"""How many sessions fit, and how memory grows with them: arithmetic on a model's geometry, nothing is run.

    total = weights + sessions · (bytes of one session in the cache's format)

Of a model with 16-bit weights, 4-bit ones are computed as `octavo quantize` makes them, in groups of 128, 4.19 bits a
weight (of 64 or 32 where those pack more); embeddings, norms, the head and experts stay as they are. Activations and
the runtime come on top: hold memory back for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import OctavoError
from octavo.measure.memory.costs import costs, weight_kinds
from octavo.measure.report.svg import require_matplotlib
from octavo.models.geometry import Geometry
from octavo.quant.format import Format

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = (".png", ".svg", ".pdf")
COLOURS = ("#444444", "#c7660a", "#2166ac", "#1b7837")  # dark enough for text on white


@dataclass(frozen=True)
class Fit:
    """Sessions that fit with one kind of weights and one cache format; bytes."""

    weights: str
    kv: str
    weight_bytes: int
    session_bytes: int
    sessions: int
    spare_bytes: int = 0  # raw pages beside those of sessions

    def total(self, sessions: int) -> int:
        return self.weight_bytes + self.spare_bytes + sessions * self.session_bytes


def fits(geometry: Geometry, formats: Sequence[Format], context: int, memory: int) -> list[Fit]:
    """For each kind of weights, each format: sessions of `context` tokens in `memory` bytes."""
    return [
        Fit(cost.weights, cost.format, cost.weight_bytes, cost.session, cost.sessions, cost.spare)
        for cost in costs(geometry, formats, context, memory, list(weight_kinds(geometry)))
    ]


def draw(plan: Sequence[Fit], memory: int, context: int, name: str, path: Path) -> None:
    """The growth of total memory with the number of sessions, each line up to where `memory` is full.

    Raises OctavoError where matplotlib is missing, the file cannot be written, or not one session fits.
    """
    check_picture(path)
    lines = sorted((fit for fit in plan if fit.sessions > 0), key=lambda fit: fit.sessions)
    if not lines:
        raise OctavoError("there is nothing to draw: the weights leave no room for a session; raise --memory")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    full, widest = memory / 2**30, lines[-1].sessions
    order = {id(fit): i for i, fit in enumerate(plan)}
    for place, fit in enumerate(lines):
        leftwards = place % 2 == 0 and fit.sessions > widest / 5
        _line(axes, fit, COLOURS[order[id(fit)] % len(COLOURS)], full, leftwards)
    axes.axhline(full, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlim(0, widest * 1.2)
    axes.set_ylim(0, full * 1.26)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= full])
    axes.set_xlabel(f"sessions of {context:,} tokens at a time")
    axes.set_ylabel("GiB")
    axes.set_title(f"Weights and KV cache of {name} (computed)", loc="left", fontsize=11)
    axes.annotate(
        f"{full:,.4g} GiB",
        (widest * 1.2, full),
        (0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#777777",
    )
    axes.spines[["top", "right"]].set_visible(False)
    try:
        with rc_context({"svg.hashsalt": name}):  # the same picture is the same file
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise OctavoError(f"the picture {path} cannot be written: {error.strerror}") from None


def check_picture(path: Path) -> None:
    """Raise OctavoError for a file that no picture can be drawn to, before the work."""
    if path.suffix.lower() not in PICTURES:
        raise OctavoError(f"--plot {path}: a picture's name ends with {', '.join(PICTURES)}")
    require_matplotlib()


def _line(axes: Axes, fit: Fit, colour: str, full: float, leftwards: bool) -> None:
    """One line with its name and its number of sessions where it ends; neighbours' labels stand on either side."""
    top = fit.total(fit.sessions) / 2**30
    axes.plot([0, fit.sessions], [fit.weight_bytes / 2**30, top], color=colour, linewidth=2)
    axes.plot(fit.sessions, top, "o", color=colour, markersize=6)
    axes.annotate(
        f"{fit.weights} weights\n{fit.kv} KV\n{fit.sessions:,} sessions",
        (fit.sessions, full),
        (-3 if leftwards else 3, 9),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        va="bottom",
        color=colour,
        linespacing=1.25,
    )
