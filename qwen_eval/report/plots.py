"""Plots of the HTML page as inline SVG: quality over speed, differences by task, long contexts, scores. No script.

Why not matplotlib, which draws the figures that are saved as files (`qwen_eval/figures.py`): here colours follow the
page's light or dark theme by its style sheet, every dot has a tooltip, text stays text that can be searched and read
aloud, and a page is written without its import. Matplotlib's SVG has fixed colours and no tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen_eval.core import Metric
from qwen_eval.report.forest import forest_plots
from qwen_eval.report.long_context import perplexities
from qwen_eval.report.runs import RunSet
from qwen_eval.report.samples import needle_cells
from qwen_eval.report.settings import run_names
from qwen_eval.report.svg import (
    RIGHT,
    WIDTH,
    Scale,
    axis_title,
    colour,
    dot,
    grid_line,
    legend,
    level,
    line,
    path,
    svg,
    text,
    ticks,
)
from qwen_eval.report.tradeoffs import Tradeoff, Tradeoffs, tradeoffs
from qwen_eval.report.verdict import Judgement
from qwen_eval.runs.run import Run
from qwen_eval.tables import html_text as escape

LEFT, TOP, ROW = 190.0, 12.0, 24.0
BAD, MIDDLE, GOOD = (217, 96, 26), (247, 247, 247), (42, 127, 184)  # told apart without green and red
SPREAD = 5.0  # pixels between the intervals of lines at one length


def plots(runs: RunSet, judgements: Sequence[Judgement] = ()) -> list[tuple[str, str]]:
    """(title, svg) of every plot that there is data for, what helps a decision most first."""
    needles = [run for run in runs.finished if _is_needle(run)]
    names = _names(needles)
    found = [("Quality, speed and memory", tradeoff_plot(runs)), *forest_plots(judgements)]
    found += [("Perplexity by length", length_plot(runs.finished))]
    found += [(f"Needle in a haystack: {names[run.path]}", needle_plot(run)) for run in needles]
    found += [("Scores with 95 % intervals", score_plot(runs.finished))]
    return [(title, drawn) for title, drawn in found if drawn]


# --- quality over speed ----------------------------------------------------------------------------------------------


def tradeoff_plot(runs: RunSet) -> str:
    """The score of one benchmark over decode speed, the area of a dot is its peak memory; one dot a checkpoint."""
    found = tradeoffs(runs)
    if not found.points:
        return ""
    x, y, body = _tradeoff_axes(found)
    top, front = max(p.peak_bytes for p in found.points) or 1.0, found.front
    if len(front) > 1:
        body.append(path([(x(p.tok_per_s), y(p.score)) for p in front], "front"))
    for i, point in enumerate(found.points):
        body += _tradeoff_dot(point, i, (x, y), top, is_beaten=point not in front)
    body += [axis_title(340, "decode speed in tokens/s"), axis_title(14, f"{found.what}, score in %", "")]
    body += legend([_tradeoff_name(p) for p in found.points], 364)
    below = 364 + 20 * len(found.points)
    said = "line: the Pareto front" if len(front) > 1 else "the front is one point"
    notes = [
        f"{said}; pale: another is as good in score, speed and memory, and better in one",
        "area: peak memory; bars: 95 % interval of the score, range of the speed over repeats", *found.notes,
    ]  # fmt: skip
    body += [text(60, below + 18 * i, note, width=104) for i, note in enumerate(notes)]
    return svg(below + 18 * len(notes), body, "Quality over speed, area is memory")


def _tradeoff_axes(found: Tradeoffs) -> tuple[Scale, Scale, list[str]]:
    fastest = 1.1 * max(max(p.speed_ends or (p.tok_per_s,)) for p in found.points)
    ends = [value for p in found.points for value in (p.score, *(p.score_ends or ()))]
    low, high = max(0.0, min(ends) - 0.03), min(1.0, max(ends) + 0.03)
    x, y = Scale(0.0, fastest, 60, WIDTH - RIGHT), Scale(low, high, 300, 30)
    body = [grid_line(x(t), 26, 304, f"{t:g}") for t in ticks(0.0, fastest)]
    body += [level(60, y(t / 100), f"{t:g}") for t in ticks(100 * low, 100 * high)]
    return x, y, body


def _tradeoff_dot(
    point: Tradeoff, index: int, scales: tuple[Scale, Scale], top: float, *, is_beaten: bool
) -> list[str]:
    x, y = scales[0](point.tok_per_s), scales[1](point.score)
    kind = colour(index) + " pale" * is_beaten
    bars = []
    if point.score_ends:
        low, high = map(scales[1], point.score_ends)
        bars.append(line((x, low), (x, high), f"line thin {colour(index)}"))
    if point.speed_ends:
        low, high = map(scales[0], point.speed_ends)
        bars.append(line((low, y), (high, y), f"line thin {colour(index)}"))
    return [*bars, dot(x, y, kind, _tradeoff_name(point), 5 + 14 * math.sqrt(point.peak_bytes / top))]


def _tradeoff_name(point: Tradeoff) -> str:
    return f"{point.name}: {point.score:.1%} at {point.tok_per_s:,.1f} tokens/s, {point.peak_bytes / 2**30:.2f} GiB"


# --- long contexts ---------------------------------------------------------------------------------------------------


def length_plot(runs: Sequence[Run]) -> str:
    """Perplexity over context length, both logarithmic, one line a run with its intervals."""
    series, names = [], _names(runs)
    for run in runs:
        points = [(n, m) for n, m in sorted(perplexities(run).items()) if m.value > 0 and math.isfinite(m.value)]
        if len(points) > 1:
            series.append((names[run.path], points))
    if not series:
        return ""
    x, y, body = _length_axes([point for _, points in series for point in points])
    for i, (name, points) in enumerate(series):
        body.append(path([(x(math.log(n)), y(math.log(m.value))) for n, m in points], f"line {colour(i)}"))
        shift = SPREAD * (i - (len(series) - 1) / 2)
        for n, m in points:
            body += _length_point(name, n, m, i, (x(math.log(n)), shift, y))
    body += [axis_title(340, "tokens of context"), axis_title(14, "perplexity", "")]
    body += legend([name for name, _ in series], 364)
    note = "bars: 95 % intervals, mostly of which documents were drawn, common to all lines"
    body.append(text(60, 364 + 20 * len(series), note, width=104))
    return svg(364 + 20 * len(series) + 12, body, "Perplexity by context length")


def _length_axes(points: Sequence[tuple[int, Metric]]) -> tuple[Scale, Scale, list[str]]:
    lengths = sorted({n for n, _ in points})
    ends = [value for _, m in points for value in (m.value, m.low, m.high) if value is not None and value > 0]
    ends = [value for value in ends if math.isfinite(value)]
    x = Scale(math.log(lengths[0]), math.log(lengths[-1]), 75, WIDTH - RIGHT - 20)
    y = Scale(math.log(min(ends)), math.log(max(ends)), 300, 30)
    body = [grid_line(x(math.log(n)), 26, 304, f"{n:,}") for n in lengths]
    return x, y, body + [level(60, y(math.log(v)), f"{v:g}") for v in ticks(min(ends), max(ends)) if v > 0]


def _length_point(name: str, n: int, m: Metric, index: int, at: tuple[float, float, Scale]) -> list[str]:
    x, shift, y = at
    bars, said = [], ""
    if m.low is not None and m.high is not None and m.low > 0 and math.isfinite(m.high):
        ends = (x + shift, y(math.log(m.low))), (x + shift, y(math.log(m.high)))
        bars, said = [line(*ends, f"line thin {colour(index)}")], f" [{m.low:.3f}, {m.high:.3f}]"
    return [*bars, dot(x, y(math.log(m.value)), colour(index), f"{name}: {m.value:.3f}{said} at {n:,} tokens")]


def needle_plot(run: Run) -> str:
    """Share found by context length and depth: a heat map with its numbers, readable without colour."""
    cells = needle_cells(run.records)
    lengths, depths = sorted({a for a, _ in cells}), sorted({b for _, b in cells})
    if not cells:
        return ""
    wide, high, left, top = (WIDTH - 80 - RIGHT) / len(lengths), 26.0, 80.0, 28.0
    body = [axis_title(14, "depth of the needle", "")]
    for row, depth in enumerate(depths):
        body.append(text(left - 10, top + 17 + row * high, f"{depth:g} %", "end"))
        for column, length in enumerate(lengths):
            if scores := cells.get((length, depth)):
                box = (left + column * wide, top + row * high, wide, high)
                body += _heat(box, scores, f"{length:,} tokens, {depth:g} % deep")
    bottom = top + len(depths) * high
    body += [text(left + (i + 0.5) * wide, bottom + 18, f"{n:,}", "middle") for i, n in enumerate(lengths)]
    body.append(axis_title(bottom + 38, "tokens in the prompt"))
    return svg(bottom + 48, body, "Share of needles found by length and depth")


def _heat(box: tuple[float, float, float, float], scores: Sequence[float], tip: str) -> list[str]:
    x, y, wide, high = box
    value = sum(scores) / len(scores)
    size = f'width="{wide - 2:.1f}" height="{high - 2:.1f}" rx="3"'
    red, green, blue = _mixed(min(1.0, max(0.0, value)))
    tile = f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="rgb({red},{green},{blue})">'
    said = text(x + wide / 2 - 1, y + high / 2 + 3, f"{value:.0%}", "middle on")
    return [f"{tile}<title>{escape(tip)}: {value:.0%} of {len(scores)}</title></rect>", said]


def _mixed(value: float) -> tuple[int, ...]:
    """From orange over white to blue; pale enough at both ends for dark figures."""
    end = BAD if value < 0.5 else GOOD
    share = 0.75 * abs(2 * value - 1)
    return tuple(round(a + share * (b - a)) for a, b in zip(MIDDLE, end))


# --- scores ----------------------------------------------------------------------------------------------------------


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
        body.append(text(12, y - 7, task, "head"))
        for run, metric in rows:
            if run.task == task:
                y += ROW
                body += [text(24, y - 7, names[run.path]), *_whisker(x, y - 11, metric, run)]
    axis = [grid_line(x(t / 100), TOP + 8, y + 4, f"{t}") for t in range(0, 101, 20)]
    body.append(axis_title(y + 38, "score in %, 95 % interval; grey: partial runs"))
    return svg(y + 48, [*axis, *body], "Scores in per cent with their intervals")


def _whisker(x: Callable[[float], float], y: float, metric: Metric, run: Run) -> list[str]:
    low = metric.low if metric.low is not None else metric.value
    high = metric.high if metric.high is not None else metric.value
    tip = f"{run.label} {run.variant}: {metric.value:.1%} [{low:.1%}, {high:.1%}], n = {metric.n:,}"
    kind = "weak" if run.status == "partial" else "c0"
    return [line((x(low), y), (x(high), y), f"line {kind}"), dot(x(metric.value), y, kind, tip, 4.5)]


# --- pieces ----------------------------------------------------------------------------------------------------------


def _names(runs: Sequence[Run]) -> dict[Path, str]:
    """What a run is called in a plot, by its directory; with what tells it apart where names repeat."""
    named = [(f"{run.label} {run.variant}", [run]) for run in runs]
    places = run_names([(f"{name} {run.task}", members) for name, members in named for run in members])
    extra = places or [""] * len(named)
    return {run.path: f"{name}, {place}" if place else name for (name, (run,)), place in zip(named, extra)}


def _is_needle(run: Run) -> bool:
    return "needle" in run.task
