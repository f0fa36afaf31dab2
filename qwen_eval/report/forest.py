"""Forest plots of paired differences: one row a task, its interval, the margin as a band, better to the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_eval.report.candidates import pair_of
from qwen_eval.report.comparison import Comparison, Family
from qwen_eval.report.svg import RIGHT, WIDTH, Scale, axis_title, dot, grid_line, line, svg, text, ticks
from qwen_eval.report.verdict import Judgement, shown

LEFT, TOP, ROW = 230.0, 30.0, 22.0
FAMILIES: tuple[tuple[Family, str, str], ...] = (
    ("share", "Differences by task", "Δ in points"),
    ("ppl", "Differences of perplexity", "Δ in per cent"),
    ("mean", "Differences of means", "Δ"),
)
TONES = {"equivalent": "fine", "not worse": "fine", "better": "fine", "worse by more than the margin": "worse"}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One difference in the unit of its axis; the ends of its interval in the order of the axis."""

    judgement: Judgement
    delta: float
    low: float
    high: float
    margin: float

    @property
    def name(self) -> str:
        c = self.judgement.comparison
        return f"{c.task} {c.metric.removeprefix('ppl/')} tokens" if c.metric.startswith("ppl/") else c.task


def forest_plots(judgements: Sequence[Judgement]) -> list[tuple[str, str]]:
    """(title, svg) for each kind of score that has a difference with an interval."""
    found = []
    for family, title, unit in FAMILIES:
        rows = [row for j in judgements if j.comparison.family == family and (row := _row(j))]
        if rows:
            found.append((title, _forest(rows, unit)))
    return found


def _row(judgement: Judgement) -> _Row | None:
    c, d = judgement.comparison, judgement.comparison.difference
    if d is None or d.low is None or d.high is None or not all(map(math.isfinite, (d.delta, d.low, d.high))):
        return None
    delta, low, high, margin = (_unit(c, value) for value in (d.delta, d.low, d.high, c.margin))
    return _Row(judgement=judgement, delta=delta, low=low, high=high, margin=margin)


def _unit(c: Comparison, value: float) -> float:
    if c.family == "share":
        return 100 * value
    return 100 * math.expm1(value) if c.family == "ppl" else value


def _forest(rows: Sequence[_Row], unit: str) -> str:
    reach = 1.06 * max(abs(value) for row in rows for value in (row.low, row.high, row.margin, 1e-9))
    up = rows[0].judgement.comparison.higher_is_better
    x = Scale(*((-reach, reach) if up else (reach, -reach)), LEFT, WIDTH - RIGHT)
    y, body, pairs = TOP, [], list(dict.fromkeys(pair_of(row.judgement.comparison) for row in rows))
    for pair in pairs:
        y += ROW
        body.append(text(4, y - 6, pair, "head", width=95))
        for row in rows:
            if pair_of(row.judgement.comparison) == pair:
                y += ROW
                body += _difference(row, x, y - 10)
    grid = [grid_line(x(t), TOP, y + 4, f"{t:+g}" if t else "0") for t in ticks(-reach, reach)]
    ends = [text(LEFT, 16, "← worse", "title"), text(WIDTH - RIGHT, 16, "better →", "end title")]
    ends += [text(x(0), 16, "band: the margin", "middle title"), axis_title(y + 36, f"{unit}, paired, 95 % interval")]
    return svg(y + 46, [*grid, line((x(0), TOP), (x(0), y + 4), "zero"), *body, *ends], "Paired differences by task")


def _difference(row: _Row, x: Scale, y: float) -> list[str]:
    c, decision = row.judgement.comparison, row.judgement.decision
    d = c.difference
    assert d is not None
    kind = TONES.get(decision.word if decision else "", "open")
    ends = ", ".join(shown(c, value, sign=True) for value in (d.low, d.high))
    tip = f"{row.name}: Δ {shown(c, d.delta, sign=True)} [{ends}], n = {d.n:,}; {decision.text if decision else ''}"
    left, right = sorted((x(-row.margin), x(row.margin)))
    band = f'<rect class="band" x="{left:.1f}" y="{y - 11:.1f}" width="{right - left:.1f}" height="{ROW:g}"/>'
    whisker = line((x(row.low), y), (x(row.high), y), f"line {kind}", tip)
    return [band, text(16, y + 4, row.name, width=32), whisker, dot(x(row.delta), y, kind, tip, 4.5)]
