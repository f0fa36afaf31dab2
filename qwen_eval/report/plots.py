"""Plots as inline SVG: no script, no image; colours and text follow the page's theme through its style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen_eval.core import Metric
from qwen_eval.report.long_context import perplexities
from qwen_eval.report.runs import RunSet
from qwen_eval.report.samples import needle_cells
from qwen_eval.report.settings import run_names
from qwen_eval.report.tradeoffs import Tradeoff, tradeoffs
from qwen_eval.runs.run import Run
from qwen_eval.tables import html_text as escape

WIDTH = 680.0
LEFT, RIGHT, TOP, BOTTOM = 190.0, 24.0, 12.0, 34.0
ROW = 24.0
NUM_COLOURS = 8


def plots(runs: RunSet) -> list[tuple[str, str]]:
    """(title, svg) of every plot that these runs have the data for."""
    found = [
        ("Scores with 95 % intervals", score_plot(runs.finished)),
        ("Perplexity by length", length_plot(runs.finished)),
    ]
    needles = [run for run in runs.finished if _is_needle(run)]
    names = _names(needles)
    found += [(f"Needle in a haystack: {names[run.path]}", needle_plot(run)) for run in needles]
    found += [("Quality, speed and memory", tradeoff_plot(runs))]
    return [(title, svg) for title, svg in found if svg]


def score_plot(runs: Sequence[Run]) -> str:
    """Dots with whiskers in per cent, one row a run, tasks one under the other."""
    rows = [(run, run.headline[1]) for run in runs if run.headline and run.headline[1].kind == "share"]
    if not rows:
        return ""
    rows.sort(key=lambda row: (row[0].task, row[0].label, row[0].variant))
    names = _names([run for run, _ in rows])
    body, y, tasks = [], TOP, list(dict.fromkeys(run.task for run, _ in rows))

    def x(value: float) -> float:
        return LEFT + value * (WIDTH - LEFT - RIGHT)

    for task in tasks:
        y += ROW
        body.append(_label(12, y - 7, task, "head"))
        for run, metric in rows:
            if run.task == task:
                y += ROW
                body += [_label(24, y - 7, names[run.path]), *_whisker(x, y - 11, metric, run)]
    axis = [_grid_line(x(t / 100), TOP + 8, y + 4, f"{t}") for t in range(0, 101, 20)]
    return _svg(y + BOTTOM, [*axis, *body], "Scores in per cent with their intervals")


def length_plot(runs: Sequence[Run]) -> str:
    """Perplexity over context length, both logarithmic, one line a run."""
    series, names = [], _names(runs)
    for run in runs:
        points = sorted((length, metric.value) for length, metric in perplexities(run).items())
        points = [(length, value) for length, value in points if value > 0 and math.isfinite(value)]
        if len(points) > 1:
            series.append((names[run.path], points))
    if not series:
        return ""
    lengths = sorted({length for _, points in series for length, _ in points})
    values = [value for _, points in series for _, value in points]
    x = _Scale(math.log(lengths[0]), math.log(lengths[-1]), 60, WIDTH - RIGHT)
    y = _Scale(math.log(min(values)), math.log(max(values)), 300, 24)
    ticks = _ticks(min(values), max(values))
    body = [_grid_line(x(math.log(n)), 20, 304, f"{n:,}") for n in lengths]
    body += [_level(60, y(math.log(v)), f"{v:g}") for v in ticks]
    for i, (name, points) in enumerate(series):
        path = " ".join(f"{x(math.log(a)):.1f},{y(math.log(b)):.1f}" for a, b in points)
        body.append(f'<polyline class="line c{i % NUM_COLOURS}" points="{path}"/>')
        body += [_dot(x(math.log(a)), y(math.log(b)), i, f"{name}: {b:.3f} at {a:,} tokens") for a, b in points]
    return _svg(
        340 + 20 * len(series), body + _legend([name for name, _ in series], 344), "Perplexity by context length"
    )


def needle_plot(run: Run) -> str:
    """Share found by context length and depth: a heat map with its numbers, readable without colour."""
    cells = needle_cells(run.records)
    lengths, depths = sorted({a for a, _ in cells}), sorted({b for _, b in cells})
    if not cells:
        return ""
    wide, high = (WIDTH - 80 - RIGHT) / len(lengths), 26.0
    body = []
    for row, depth in enumerate(depths):
        body.append(_label(70, TOP + 17 + row * high, f"{depth:g} %", "end"))
        for column, length in enumerate(lengths):
            scores = cells.get((length, depth))
            if scores:
                value = sum(scores) / len(scores)
                body += _heat(
                    80 + column * wide, TOP + row * high, wide, high, value, f"{length:,} tokens, {depth:g} % deep"
                )
    bottom = TOP + len(depths) * high
    body += [_label(80 + (i + 0.5) * wide, bottom + 18, f"{n:,}", "middle") for i, n in enumerate(lengths)]
    return _svg(bottom + 30, body, "Share of needles found by length and depth")


def tradeoff_plot(runs: RunSet) -> str:
    """The score of one benchmark over decode speed, the area of a dot is its peak memory; one dot a checkpoint."""
    found = tradeoffs(runs)
    if not found.points:
        return ""
    points = found.points
    x = _Scale(0.0, max(p.tok_per_s for p in points) * 1.1, 60, WIDTH - RIGHT)
    scores = [p.score for p in points]
    y = _Scale(max(0.0, min(scores) - 0.05), min(1.0, max(scores) + 0.05), 300, 24)
    ticks = _ticks(0.0, max(p.tok_per_s for p in points) * 1.1)
    body = [_grid_line(x(t), 20, 304, f"{t:g}") for t in ticks]
    body += [_level(60, y(t / 100), f"{t}") for t in range(0, 101, 5) if 24 <= y(t / 100) <= 300]
    top = max(p.peak_bytes for p in points) or 1.0
    body += [_tradeoff_dot(p, i, x(p.tok_per_s), y(p.score), top) for i, p in enumerate(points)]
    body += [_label(WIDTH - RIGHT, 332, "tokens/s", "end"), _label(60, 14, f"{found.what}, score in %", width=90)]
    body += _legend([p.name for p in points], 352)
    below = 352 + 20 * len(points)
    body += [_label(60, below + 20 * i, note, width=100) for i, note in enumerate(found.notes)]
    return _svg(below + 20 * len(found.notes), body, "Quality over speed, area is memory")


# --- pieces ----------------------------------------------------------------------------------------------------------


def _tradeoff_dot(point: Tradeoff, index: int, x: float, y: float, top: float) -> str:
    tip = f"{point.name}: {point.score:.1%} at {point.tok_per_s:,.1f} tokens/s, {point.peak_bytes / 2**30:.2f} GiB"
    return _dot(x, y, index, tip, 5 + 16 * math.sqrt(point.peak_bytes / top))


def _names(runs: Sequence[Run]) -> dict[Path, str]:
    """What a run is called in a plot, by its directory; with what tells it apart where names repeat."""
    named = [(f"{run.label} {run.variant}", [run]) for run in runs]
    places = run_names([(f"{name} {run.task}", members) for name, members in named for run in members])
    extra = places or [""] * len(named)
    return {run.path: f"{name}, {place}" if place else name for (name, (run,)), place in zip(named, extra)}


def _is_needle(run: Run) -> bool:
    return "needle" in run.task


def _svg(height: float, body: Sequence[str], label: str) -> str:
    inner = "\n".join(body)
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def _label(x: float, y: float, text: str, kind: str = "", width: int = 30) -> str:
    shown = text if len(text) <= width else text[: width - 1] + "…"
    tip = f"<title>{escape(text)}</title>" if shown != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(shown)}{tip}</text>'


def _grid_line(x: float, top: float, bottom: float, text: str) -> str:
    line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
    return line + _label(x, bottom + 16, text, "middle")


def _level(left: float, y: float, text: str) -> str:
    line = f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - RIGHT:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _label(left - 6, y + 4, text, "end")


def _whisker(x: Callable[[float], float], y: float, metric: Metric, run: Run) -> list[str]:
    low = metric.low if metric.low is not None else metric.value
    high = metric.high if metric.high is not None else metric.value
    tip = f"{run.label} {run.variant}: {metric.value:.1%} [{low:.1%}, {high:.1%}], n = {metric.n:,}"
    colour = "weak" if run.status == "partial" else "c0"
    dot = f'<circle class="{colour}" cx="{x(metric.value):.1f}" cy="{y:.1f}" r="4.5">'
    dot += f"<title>{escape(tip)}</title></circle>"
    return [f'<line class="line {colour}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>', dot]


def _dot(x: float, y: float, index: int, tip: str, radius: float = 4.0) -> str:
    circle = f'<circle class="c{index % NUM_COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
    return f"{circle}<title>{escape(tip)}</title></circle>"


def _heat(x: float, y: float, wide: float, high: float, value: float, tip: str) -> list[str]:
    hue = 8 + 132 * value  # red to green, and the number says it as well
    size = f'width="{wide - 2:.1f}" height="{high - 2:.1f}" rx="3"'
    box = f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="hsl({hue:.0f} 55% 40%)">'
    text = f'<text x="{x + wide / 2 - 1:.1f}" y="{y + high / 2 + 3:.1f}" class="middle on">{value:.0%}</text>'
    return [f"{box}<title>{escape(tip)}: {value:.0%}</title></rect>", text]


def _legend(names: Sequence[str], top: float) -> list[str]:
    rows = []
    for i, name in enumerate(names):
        rows.append(f'<circle class="c{i % NUM_COLOURS}" cx="68" cy="{top + 20 * i - 4:.1f}" r="5"/>')
        rows.append(_label(80, top + 20 * i, name, width=90))
    return rows


class _Scale:
    """A linear map of an interval onto another; a point of zero width maps to the middle."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._span, self._start, self._end = low, high - low, start, end

    def __call__(self, value: float) -> float:
        part = (value - self._low) / self._span if self._span else 0.5
        return self._start + part * (self._end - self._start)


def _ticks(low: float, high: float) -> list[float]:
    """About five round values within [low, high]."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
