"""Figures as files, drawn with matplotlib: the needle heat map, perplexity over context length, lines of profiles."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen_eval.core import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120
BAD, GOOD = "#d9601a", "#2a7fb8"  # told apart without green and red


def heat_map(cells: Mapping[tuple[int, float], Metric], form: str) -> bytes:
    """Share found by (length, depth in per cent), as svg or png. Each cell shows its number and its 95 % interval."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    figure = Figure(figsize=(1.8 + 1.0 * len(lengths), 1.2 + 0.55 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    values = [[cells[n, d].value if (n, d) in cells else math.nan for n in lengths] for d in depths]
    colours = LinearSegmentedColormap.from_list("found", [BAD, "#f7f7f7", GOOD])
    axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (length, depth), metric in cells.items():
        text = f"{100 * metric.value:.0f} %"
        if metric.low is not None and metric.high is not None:
            text += f"\n{100 * metric.low:.0f}-{100 * metric.high:.0f}"
        axes.text(lengths.index(length), depths.index(depth), text, ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:g} %" for d in depths])
    axes.set_xlabel("tokens in the prompt")
    axes.set_ylabel("depth of the needle")
    return _saved(figure, form)


def length_curves(rows: Mapping[str, Mapping[int, Metric]], form: str) -> bytes:
    """Perplexity over length, both logarithmic, one line a row; svg or png.

    A single row shows its 95 % intervals. Those of several rows say how documents differ, which all rows share, and
    would hide how the rows differ: that is in the table of changes, pair by pair.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, metrics in rows.items():
        lengths = sorted(metrics)
        found = [metrics[n] for n in lengths]
        below = [m.value - (m.value if m.low is None else m.low) for m in found]
        above = [(m.value if m.high is None else m.high) - m.value for m in found]
        bars = [below, above] if len(rows) == 1 else None
        axes.errorbar(lengths, [m.value for m in found], yerr=bars, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 2 * low:  # within one octave the decades' ticks say nothing
        axes.set_yscale("linear")
    else:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter() if high > 20 * low else StrMethodFormatter("{x:g}"))
    every = sorted({length for metrics in rows.values() for length in metrics})
    axes.set_xticks(every, [f"{n:,}" for n in every])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("perplexity")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    return _saved(figure, form)


def lines(series: Mapping[str, Mapping[int, float]], form: str, *, x: str, y: str) -> bytes:
    """One line a name over a logarithmic axis of sizes; svg or png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, points in series.items():
        sizes = sorted(points)
        axes.plot(sizes, [points[size] for size in sizes], marker="o", label=name)
    every = sorted({size for points in series.values() for size in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [f"{n:,}" for n in every])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return _saved(figure, form)


def bars(series: Mapping[str, Mapping[str, float]], form: str, *, y: str) -> bytes:
    """Bars side by side, one colour a name, one group a label; svg or png."""
    from matplotlib.figure import Figure

    labels = list(next(iter(series.values())))
    figure = Figure(figsize=(2.0 + 0.3 * len(labels) * (1 + 0.4 * len(series)), 4.0), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [k + (i - (len(series) - 1) / 2) * width for k in range(len(labels))]
        axes.bar(places, [values[label] for label in labels], width=width, label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(y)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend()
    return _saved(figure, form)


def _saved(figure: Figure, form: str) -> bytes:
    """The same bytes each time: no date, fixed ids."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "qwen_eval", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()
