"""One table model and its renderings: terminal, Markdown, CSV, LaTeX. (HTML is in html.py.)"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_eval.core import Metric

PLUS_MINUS = "±"
NO_WRAP = 34  # characters: shorter cells are never broken
NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is shown, what it is sorted by, its interval, and what a pointer over it tells.

    `tone`: "", "good", "bad", "weak".
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    title: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """`columns` are headers; a row has as many cells. `notes` explain its marks and stand below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    name: str = ""  # stable, for files and links

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows}
        assert widths <= {len(self.columns)}, f"{self.title}: rows of {widths} cells under {len(self.columns)} columns"


def text_cell(text: object, *, title: str = "", tone: str = "") -> Cell:
    return Cell(text=NONE if text in (None, "") else str(text), title=title, tone=tone)


def number_cell(value: float | None, digits: int = 1, *, tone: str = "", title: str = "") -> Cell:
    if value is None or math.isnan(value):
        return Cell(text=NONE, title=title)
    return Cell(text=f"{value:,.{digits}f}", value=value, tone=tone, title=title)


def metric_cell(metric: Metric | None, *, mark: str = "", tone: str = "") -> Cell:
    """`61.2 ±2.6`: shares in per cent; a clearly lopsided interval is written out, `2.1 +3.9/−1.4`."""
    if metric is None or math.isnan(metric.value):
        return Cell(text=NONE)
    scale, digits = (100.0, 1) if metric.kind == "share" else (1.0, _digits(metric))
    value = metric.value * scale
    text = f"{value:.{digits}f}"
    title = f"n = {metric.n:,}" + (f" in {metric.num_clusters:,} clusters" if metric.num_clusters else "")
    if metric.low is not None and metric.high is not None:
        low, high = metric.low * scale, metric.high * scale
        text += " " + interval_text(value, low, high, digits)
        title += f"; 95 % interval {low:.{digits + 1}f} to {high:.{digits + 1}f}"
    return Cell(text=text + mark, value=metric.value, low=metric.low, high=metric.high, title=title, tone=tone)


def interval_text(value: float, low: float, high: float, digits: int) -> str:
    """`±` the larger side where the sides are alike (within a fifth), else both."""
    down, up = value - low, high - value
    if abs(up - down) <= 0.2 * max(up, down):
        return f"{PLUS_MINUS}{max(up, down):.{digits}f}"
    return f"+{up:.{digits}f}/−{down:.{digits}f}"


def render(tables: Sequence[Table], form: str) -> str:
    """All tables as one text; `form` is terminal, md, csv or tex."""
    return "\n".join(RENDERERS[form](table) for table in tables)


def to_terminal(table: Table, width: int | None = None) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(title=Text(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(table.columns):
        is_number = any(row[i].value is not None for row in table.rows)
        is_short = max((len(row[i].text) for row in table.rows), default=0) <= NO_WRAP
        justify: Literal["right", "left"] = "right" if is_number else "left"
        grid.add_column(Text(column), justify=justify, overflow="fold", no_wrap=is_short)
    styles = {"good": "green", "bad": "red", "weak": "dim", "": ""}
    for row in table.rows:
        grid.add_row(*(Text(_visible(cell.text), style=styles[cell.tone]) for cell in row))
    out = io.StringIO()
    console = Console(file=out, width=width or _terminal_width(), highlight=False)
    console.print(grid)
    for note in table.notes:
        console.print(Text(f"  {_visible(note)}", style="dim"), soft_wrap=True)
    return out.getvalue()


def to_md(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---:" if any(row[i].value is not None for row in table.rows) else "---" for i in range(len(table.columns))]
    lines = [f"### {_md(table.title)}", "", line([_md(column) for column in table.columns]), line(rule)]
    lines += [line([_md(cell.text) for cell in row]) for row in table.rows]
    return "\n".join([*lines, *([""] if table.notes else []), *(f"- {_md(note)}" for note in table.notes), ""])


def to_csv(table: Table) -> str:
    """Plain rows for a machine: the shown text, and after it unrounded value and interval where a column has them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [
        [name for name in ("value", "low", "high") if any(getattr(row[i], name) is not None for row in table.rows)]
        for i in range(len(table.columns))
    ]
    names = [[column, *(f"{column} ({part})" for part in extra)] for column, extra in zip(table.columns, parts)]
    writer.writerow(["table", *(name for group in names for name in group)])
    for row in table.rows:
        cells = [[cell.text, *(_exact(getattr(cell, part)) for part in extra)] for cell, extra in zip(row, parts)]
        writer.writerow([table.title, *(text for group in cells for text in group)])
    return out.getvalue()


def to_tex(table: Table) -> str:
    """A booktabs tabular with its caption; needs `\\usepackage{booktabs}`."""
    align = "".join(
        "r" if any(row[i].value is not None for row in table.rows) else "l" for i in range(len(table.columns))
    )
    lines = [
        r"\begin{table}",
        rf"\caption{{{_tex(table.title)}}}",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        " & ".join(map(_tex, table.columns)) + r" \\",
        r"\midrule",
        *(" & ".join(_tex(cell.text) for cell in row) + r" \\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\footnotesize {_tex(note)}" for note in table.notes),
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


RENDERERS: dict[str, Callable[[Table], str]] = {"terminal": to_terminal, "md": to_md, "csv": to_csv, "tex": to_tex}


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def _terminal_width() -> int:
    """The terminal's; into a file or a pipe nothing is squeezed."""
    import sys

    from rich.console import Console

    return Console().width if sys.stdout.isatty() else 200


def _digits(metric: Metric) -> int:
    """Enough digits that the interval shows: perplexities 3, large means fewer."""
    if metric.kind == "count":
        return 0
    if metric.kind == "ppl":
        return 3 if metric.value < 100 else 1
    return 2 if abs(metric.value) < 100 else 1


def _md(text: str) -> str:
    """Text that Markdown shows as it is: no table break, no HTML, no emphasis by accident."""
    text = _visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", text)


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$",
    "Δ": r"$\Delta$", "≤": r"$\le$", "≥": r"$\ge$", "→": r"$\rightarrow$", "†": r"\dag{}", "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in _visible(text))


def _visible(text: str) -> str:
    """One line without control characters: a terminal must not obey what a model wrote."""
    text = text.replace("\r", "").replace("\n", "⏎").replace("\t", " ")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
