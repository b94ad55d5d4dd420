"""One of the report's figures as a file of its own, in the light theme: .svg, .png or .pdf."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import OctavoError, require_writable
from octavo.measure.report.svg import LIGHT, ROLES, STYLE, drawn, require_matplotlib, standalone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from octavo.measure.memory.costs import Cost

PICTURES = (".png", ".svg", ".pdf")
COLOURS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")  # that an artist may have


def check_picture(path: Path) -> None:
    """Raise OctavoError for a file that no picture can be drawn to, before the work."""
    if path.suffix.lower() not in PICTURES:
        raise OctavoError(f"--plot {path}: a picture's name ends with {', '.join(PICTURES)}")
    require_matplotlib()


def require_directory(directory: Path) -> None:
    """Raise OctavoError where no report can be drawn or written, before the work."""
    require_matplotlib()
    require_writable(directory / "plots", "--out")


def draw_growth(plan: Sequence[Cost], memory: int, context: int, name: str, path: Path) -> None:
    """Memory over the number of sessions of `context` tokens, up to where `memory` is full.

    Raises OctavoError where matplotlib is missing, the file cannot be written, or not one session fits.
    """
    check_picture(path)
    if not any(fit.sessions for fit in plan):
        raise OctavoError("there is nothing to draw: the weights leave no room for a session; raise --memory")
    from matplotlib import rc_context

    from octavo.measure.report.plots import growth

    with rc_context(STYLE):
        figure = growth(plan, memory)
        figure.suptitle(f"{name} (computed), sessions of {context:,} tokens", x=0.01, ha="left", fontsize=11)
        try:
            if path.suffix.lower() == ".svg":
                path.write_text(standalone(drawn(figure, path.stem)), encoding="utf-8")
            else:
                _in_light(figure)
                figure.savefig(path, dpi=160, facecolor="white")
        except OSError as error:
            raise OctavoError(f"the picture {path} cannot be written: {error.strerror}") from None


def _in_light(figure: Figure) -> None:
    """Give a figure the light theme's colours in place of roles."""
    from matplotlib.colors import to_hex

    for artist in figure.findobj():
        for kind in COLOURS:
            read = getattr(artist, f"get_{kind}", None)
            if read is None:
                continue
            try:
                role = ROLES.get(to_hex(read()))
            except (TypeError, ValueError):  # no one colour
                continue
            if role is not None:
                getattr(artist, f"set_{kind}")(LIGHT[role])
