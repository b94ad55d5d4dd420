"""Figures as SVG: inline in a page whose style sheet colours them, or as files of their own.

Colours are roles (INK, MUTED, RULE, SERIES) until a figure is written. In a page a role becomes a CSS variable, so that
light and dark need one figure; in a file it becomes the light theme's colour on white.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError, install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"  # no figure uses these as colours
SERIES = ("#050500", "#050501", "#050502", "#050503", "#050504")
ROLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {role: f"c{i}" for i, role in enumerate(SERIES)}
LIGHT = {
    "ink": "#1d1b18", "muted": "#6f6a62", "rule": "#ddd7cc", "paper": "#ffffff",
    "c0": "#5d5a55", "c1": "#0a6c8c", "c2": "#7446a5", "c3": "#c2410c", "c4": "#8a6a00",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
}


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OctavoError(f"plots need matplotlib: {install('report')}") from None


def inline(text: str, name: str, title: str) -> str:
    """A `drawn` figure as an <svg> element for a page: no prolog, no address, ids that no other figure has, colours by
    CSS."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    text = re.sub(r"font: ([^;\"']*?\d+px)[^;\"]*", r"font: \1 var(--sans)", text)
    for colour, role in ROLES.items():
        text = text.replace(colour, f"var(--{role})")
    return text


def standalone(text: str) -> str:
    """A `drawn` figure as a whole SVG file in the light theme, on white."""
    for colour, role in ROLES.items():
        text = text.replace(colour, LIGHT[role])
    text = re.sub(r"font: ([^;\"']*?\d+px)[^;\"]*", r"font: \1 Helvetica, Arial, sans-serif", text)
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', text, count=1)


def drawn(figure: Figure, name: str) -> str:
    """A figure as SVG, its colours still roles."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
