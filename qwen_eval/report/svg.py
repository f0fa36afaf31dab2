"""Pieces of inline SVG: text, lines, dots, axes. Colours and text follow the page's theme through its style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qwen_eval.tables import html_text as escape

WIDTH = 680.0
RIGHT = 24.0
NUM_COLOURS = 8


class Scale:
    """A linear map of an interval onto another; a point of zero width maps to the middle."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._span, self._start, self._end = low, high - low, start, end

    def __call__(self, value: float) -> float:
        part = (value - self._low) / self._span if self._span else 0.5
        return self._start + part * (self._end - self._start)


def svg(height: float, body: Sequence[str], label: str) -> str:
    inner = "\n".join(body)
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def text(x: float, y: float, said: str, kind: str = "", width: int = 30) -> str:
    """A line of text, cut at `width` characters with the whole of it under the pointer."""
    shown = said if len(said) <= width else said[: width - 1] + "…"
    tip = f"<title>{escape(said)}</title>" if shown != said else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(shown)}{tip}</text>'


def axis_title(y: float, said: str, kind: str = "end") -> str:
    """Below a horizontal axis at its right end, or above a vertical one at the left."""
    return text(WIDTH - RIGHT if kind == "end" else 4, y, said, f"{kind} title", width=90)


def line(first: tuple[float, float], second: tuple[float, float], kind: str, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    ends = f'x1="{first[0]:.1f}" y1="{first[1]:.1f}" x2="{second[0]:.1f}" y2="{second[1]:.1f}"'
    return f'<line class="{kind}" {ends}>{title}</line>'


def path(points: Sequence[tuple[float, float]], kind: str) -> str:
    listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{listed}"/>'


def grid_line(x: float, top: float, bottom: float, said: str) -> str:
    return line((x, top), (x, bottom), "grid") + text(x, bottom + 16, said, "middle")


def level(left: float, y: float, said: str) -> str:
    return line((left, y), (WIDTH - RIGHT, y), "grid") + text(left - 6, y + 4, said, "end")


def dot(x: float, y: float, kind: str, tip: str, radius: float = 4.0) -> str:
    circle = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
    return f"{circle}<title>{escape(tip)}</title></circle>"


def colour(index: int) -> str:
    return f"c{index % NUM_COLOURS}"


def legend(names: Sequence[str], top: float) -> list[str]:
    rows = []
    for i, name in enumerate(names):
        rows.append(f'<circle class="{colour(i)}" cx="68" cy="{top + 20 * i - 4:.1f}" r="5"/>')
        rows.append(text(80, top + 20 * i, name, width=90))
    return rows


def ticks(low: float, high: float) -> list[float]:
    """About five round values within [low, high]."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
