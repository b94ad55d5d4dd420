"""The report's figures: each a function of measured numbers that returns a matplotlib Figure.

All are narrow enough for a phone and stand side by side on a desk. Lines are labelled where they end, not in a legend.
Colours are the roles of svg.py; a format has the same one everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo.measure.accuracy.clipping import Shares
from octavo.measure.accuracy.retrieval import Retrieval
from octavo.measure.memory.costs import Cost
from octavo.measure.report.svg import MUTED, PAPER, SERIES, STYLE
from octavo.measure.speed.roofline import Ceiling
from octavo.measure.speed.throughput import Speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0  # inches
COLOURS = {  # 16 bits: SERIES[0]
    "kv8": SERIES[1], "k8v4": SERIES[2], "kv4": SERIES[3], "int8": SERIES[4],
    "int8-token": SERIES[1], "int4-token": SERIES[3],
}  # fmt: skip
PIXELS = 512  # columns of a map of channels, at most
Line = tuple[str, Sequence[float], Sequence[float]]  # name, x, y


def colour(kv: str) -> str:
    return COLOURS.get(kv, SERIES[0])


def growth(fits: Sequence[Cost], memory: int) -> Figure:
    """Total memory over the number of sessions, up to where `memory` is full."""
    figure, axes = _figure(3.4)
    full = memory / 2**30
    lines = sorted((fit for fit in fits if fit.sessions), key=lambda fit: fit.sessions)
    widest = max((fit.sessions for fit in lines), default=1)
    label = 0.4 * widest  # the width of a label, about
    levels: list[float] = []  # where each row of labels ends
    for fit in lines:
        x, style = fit.sessions, "-" if fit.weights != "int4" else (0, (4, 2))
        axes.plot([0, x], [fit.weight_bytes / 2**30, full], color=colour(fit.format), linestyle=style)
        axes.plot(x, full, "o", color=colour(fit.format), markersize=5)
        right = max(x, label)
        level = next((i for i, end in enumerate(levels) if end < right - label), len(levels))
        levels[level : level + 1] = [right]
        height = full * (1.05 + 0.17 * level)
        axes.plot([x, x], [full, height], color=colour(fit.format), linewidth=0.6)
        name = f"{fit.weights} weights, {fit.format} cache\n{x:,} sessions"
        axes.annotate(
            name, (right, height), (-4, -2), textcoords="offset points", va="bottom", ha="right", fontsize=9,
            color=colour(fit.format),
        )  # fmt: skip
    axes.axhline(full, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set(xlim=(0, widest * 1.04), ylim=(0, full * (1.08 + 0.17 * len(levels))))
    axes.set(xlabel="sessions at a time", ylabel="weights and cache, GiB")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= full])
    return figure


def kl_by_position(lines: Sequence[Line], rounding: float) -> Figure:
    """KL over the position in the window, pieces of a window as points."""
    figure, axes = _figure(3.1)
    axes.set_yscale("log")
    ends = _lines(axes, lines)
    first, last = lines[0][1][0], lines[0][1][-1]
    axes.plot([first, last], [rounding] * 2, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set(xlabel="position in the window, tokens", ylabel="KL, nats per token")
    _end_labels(axes, [*ends, ("last bit", last, rounding, MUTED)])
    return figure


def retrieval(rows: Sequence[Retrieval]) -> Figure:
    """The share of values that each format finds, by the part of the context that they stand in."""
    figure, axes = _figure(3.1)
    x = [(part + 0.5) / len(rows[0].right_by_depth) for part in range(len(rows[0].right_by_depth))]
    ends = _lines(axes, [(row.name, x, row.right_by_depth) for row in rows])
    axes.set(xlabel="place in the context, from its beginning to its end", ylabel="values found", ylim=(-0.03, 1.03))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    _end_labels(axes, ends)
    return figure


def kl_by_layer(layers: Sequence[int], kl: dict[str, list[float]]) -> Figure:
    """KL with a single layer in a format and the others in 16 bits."""
    figure, axes = _figure(3.1)
    axes.set_yscale("log")
    ends = _lines(axes, [(name, layers, [max(value, 1e-9) for value in values]) for name, values in kl.items()])
    axes.set(xlabel="layer", ylabel="KL, nats per token")
    _whole_ticks(axes)
    _end_labels(axes, ends)
    return figure


def ranges(widths: Sequence[Tensor]) -> Figure:
    """A map of how wide each channel is: layers down, channels [kv_heads, dim] across. Brightness is logarithmic."""
    from matplotlib.colors import LogNorm

    figure, axes = _figure(max(2.2, min(5.0, 1.3 + 0.16 * len(widths))))
    heads = len(widths[0])
    columns = max(width.numel() for width in widths)
    rows = torch.full((len(widths), columns), float("nan"))
    for row, width in zip(rows, widths, strict=True):
        row[: width.numel()] = width.flatten().clamp(min=1e-6)
    if columns > PIXELS:  # the widest of neighbours: an outlier stays visible
        rows = torch.nn.functional.adaptive_max_pool1d(rows.nan_to_num(1e-6)[None], PIXELS)[0]
    seen = rows[~rows.isnan()]
    low, high = seen.min().item(), max(seen.max().item(), 1.01 * seen.min().item())
    place = (0, columns, len(widths), 0)
    image = axes.imshow(
        rows.numpy(), cmap="viridis", norm=LogNorm(low, high), aspect="auto", interpolation="none", extent=place
    )
    for head in range(1, heads if heads <= 16 else 0):
        axes.axvline(head * columns / heads, color="#ffffff", linewidth=0.8)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    step = -(-len(widths) // 12)
    axes.set_yticks([i + 0.5 for i in range(0, len(widths), step)], [str(i) for i in range(0, len(widths), step)])
    axes.set(xlabel=f"channel, {heads} KV head{'s' if heads > 1 else ''} side by side", ylabel="layer")
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03, aspect=18)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", length=0, labelcolor=MUTED, labelsize=9)
    ticks = [low, (low * high) ** 0.5, high]
    bar.set_ticks(ticks, labels=[f"{tick:,.0f}" if tick >= 10 else f"{tick:.2g}" for tick in ticks])
    bar.ax.minorticks_off()
    return figure


def saturation(shares: Shares) -> Figure:
    """Share of clipped values by layer; K filled, V hollow; as seen by the calibration, and with its headroom."""
    from math import floor, log10

    figure, axes = _figure(3.1)
    seen = [share for layers in shares.values() for kv in layers for share in kv if share]
    least, most = (floor(log10(limit(seen))) if seen else -6 for limit in (min, max))
    axes.set_yscale("symlog", linthresh=10.0**least, linscale=0.7)
    labels = []
    for (headroom, layers), tone in zip(shares.items(), (SERIES[0], SERIES[1]), strict=False):
        for side, fill in enumerate((tone, PAPER)):
            values = [kv[side] for kv in layers]
            axes.plot(values, "o-", color=tone, markerfacecolor=fill, markersize=4, linewidth=1.2, clip_on=False)
            labels.append((f"{'KV'[side]} × {headroom:g}", len(values) - 1, values[-1], tone))
    axes.set(xlabel="layer", ylabel="share of values clipped", ylim=(0, 10.0 ** (most + 1)))
    axes.set_yticks([0, *(10.0**power for power in range(least, most + 2))])
    axes.yaxis.set_major_formatter(lambda y, _: "0" if y == 0 else f"$10^{{{round(log10(y))}}}$")
    axes.minorticks_off()
    _whole_ticks(axes)
    _end_labels(axes, labels)
    return figure


def decode(speeds: Sequence[Speed], theory: Sequence[Ceiling]) -> Figure:
    """Decode tokens per second over the batch size; the ceilings dashed."""
    figure, axes = _figure(3.3)
    axes.set(xscale="log", yscale="log")
    labels = []
    for kv in dict.fromkeys(row.kv for row in speeds):
        own = [(row.batch_size, row.decode) for row in speeds if row.kv == kv]
        limit = [(row.batch_size, row.decode) for row in theory if row.kv == kv]
        axes.plot(*zip(*own, strict=True), "o-", color=colour(kv), markersize=4)
        axes.plot(*zip(*limit, strict=True), color=colour(kv), linestyle=(0, (3, 2)), linewidth=1.1)
        labels.append((kv, *own[-1], colour(kv)))
        labels.append((f"ceiling, {kv}", *limit[-1], colour(kv)))
    sizes = sorted({row.batch_size for row in speeds})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set(xlabel="sessions at a time", ylabel="decode, tokens per second")
    _end_labels(axes, labels)
    return figure


def latency(speeds: Sequence[Speed]) -> Figure:
    """Milliseconds per token over the batch size: the median, and a whisker to the 99th percentile."""
    figure, axes = _figure(3.3)
    axes.set_yscale("log")
    names = list(dict.fromkeys(row.kv for row in speeds))
    sizes = sorted({row.batch_size for row in speeds})
    for i, kv in enumerate(names):
        own = [row for row in speeds if row.kv == kv]
        x = [sizes.index(row.batch_size) + 0.2 * (i - (len(names) - 1) / 2) for row in own]
        p50, p99 = ([1e3 * getattr(row.per_token, name) for row in own] for name in ("p50", "p99"))
        axes.vlines(x, p50, p99, color=colour(kv), linewidth=1.2)
        axes.plot(x, p50, "o", color=colour(kv), markersize=5)
        axes.plot(x, p99, "_", color=colour(kv), markersize=6)
        axes.annotate(kv, (0.16 * i, 1.03), xycoords="axes fraction", color=colour(kv), fontsize=9)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    low, high = min(row.per_token.p50 for row in speeds), max(row.per_token.p99 for row in speeds)
    axes.set(xlabel="sessions at a time", ylabel="ms per token", xlim=(-0.5, len(sizes) - 0.5))
    axes.set_ylim(1e3 * low / 1.3, 1e3 * high * 1.3)
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
    axes.set_yticks([tick for tick in ticks if 1e3 * low / 1.3 <= tick <= 1e3 * high * 1.3])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axes.minorticks_off()
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
    return figure, axes


def _lines(axes: Axes, lines: Sequence[Line]) -> list[tuple[Any, ...]]:
    """Draw lines with points, and return the labels of their ends."""
    for name, x, y in lines:
        axes.plot(x, y, "o-", color=colour(name), markersize=3.5)
    return [(name, x[-1], y[-1], colour(name)) for name, x, y in lines]


def _whole_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _end_labels(axes: Axes, labels: list[tuple[Any, ...]], gap: float = 12) -> None:
    """Names (text, x, y, colour) right of where lines end, moved apart to be `gap` points from one another."""
    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]  # places the axes
    points = 72 / figure.dpi
    ends = sorted(((axes.transData.transform((x, y))[1] * points, text, x, y, tone) for text, x, y, tone in labels))
    heights: list[float] = []
    for height, *_ in ends:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    top = axes.get_window_extent().y1 * points
    for i in range(len(heights) - 1, -1, -1):  # none above the axes
        limit = top if i == len(heights) - 1 else heights[i + 1] - gap
        heights[i] = min(heights[i], limit)
    for height, (at, text, x, y, tone) in zip(heights, ends, strict=True):
        axes.annotate(
            text, (x, y), (8, height - at), textcoords="offset points", va="center", fontsize=9, color=tone,
            annotation_clip=False,
        )  # fmt: skip
