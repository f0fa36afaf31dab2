"""One table model and its renderings: terminal, Markdown, CSV, JSON, LaTeX. (HTML is in report/html.py.)

Text of models, checkpoints and directories reaches every rendering through `plain_text`: one line, no control or
direction characters; CSV fields that a spreadsheet would run as a formula are quoted.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_eval.core import Metric
from qwen_eval.terminal import GAP, MIN_TEXT, layout, longest_piece, plain_text, terminal_width, text_width, wrapped

PLUS_MINUS = "±"
NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Footnote:
    """A footnote of a cell: `mark` follows its text, `text` is printed below the table."""

    mark: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The text shown, and the numbers for machines: value, 95 % interval, items, p-value (shares as fractions).

    `title` is the tooltip. `tone`: "", "good", "bad", "weak".
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    p: float | None = None
    title: str = ""
    tone: str = ""
    footnote: Footnote | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """`columns` are headers; a row has as many cells. `notes` stand below it, then the footnotes of its cells.

    In a terminal too narrow for all columns, those of `optional` are left out, in their order, with a note. If that
    is not enough, the other columns follow in further blocks, each beginning with the first `num_keys` columns.
    Texts of the columns of `whole` are not wrapped: optional columns are left out before.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    name: str = ""  # stable, for files and links
    optional: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    num_keys: int = 1

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows}
        assert widths <= {len(self.columns)}, f"{self.title}: rows of {widths} cells under {len(self.columns)} columns"

    def is_number(self, column: int) -> bool:
        return any(row[column].value is not None for row in self.rows)


# --- cells -----------------------------------------------------------------------------------------------------------


def text_cell(text: object, *, title: str = "", tone: str = "") -> Cell:
    return Cell(text=NONE if text in (None, "") else str(text), title=title, tone=tone)


def number_cell(value: float | None, digits: int = 1, *, tone: str = "", title: str = "") -> Cell:
    if value is None or math.isnan(value):
        return Cell(text=NONE, title=title)
    return Cell(text=f"{value:,.{digits}f}", value=value, tone=tone, title=title)


def p_cell(p_value: float | None) -> Cell:
    """`< 0.001`, `0.042`: the text as it is read, the value as it is."""
    if p_value is None or math.isnan(p_value):
        return Cell(text=NONE)
    return Cell(text="< 0.001" if p_value < 0.001 else f"{p_value:.3f}", value=p_value, p=p_value)


def metric_cell(metric: Metric | None, *, footnote: Footnote | None = None, tone: str = "") -> Cell:
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
    return Cell(
        text=f"{text} {footnote.mark}" if footnote else text, value=metric.value, low=metric.low, high=metric.high,
        n=metric.n, title=title, tone=tone, footnote=footnote,
    )  # fmt: skip


def interval_text(value: float, low: float, high: float, digits: int) -> str:
    """`±` the larger side where the sides are alike (within a fifth), else both."""
    down, up = value - low, high - value
    if abs(up - down) <= 0.2 * max(up, down):
        return f"{PLUS_MINUS}{max(up, down):.{digits}f}"
    return f"+{up:.{digits}f}/−{down:.{digits}f}"


def _digits(metric: Metric) -> int:
    """Enough digits that the interval shows: perplexities 3, large means fewer."""
    if metric.kind == "count":
        return 0
    if metric.kind == "ppl":
        return 3 if metric.value < 100 else 1
    return 2 if abs(metric.value) < 100 else 1


# --- renderings ------------------------------------------------------------------------------------------------------


def render(tables: Sequence[Table], form: str) -> str:
    """All tables as one text; `form` is terminal (of no limited width), md, csv, json or tex."""
    if form in WHOLE:
        return WHOLE[form](tables)
    return "\n".join(RENDERERS[form](table) for table in tables)


def print_tables(tables: Sequence[Table]) -> None:
    """Tables on standard output, laid out for the terminal's width."""
    width = terminal_width()
    sys.stdout.write("\n".join(to_terminal(table, width) for table in tables))
    sys.stdout.flush()


def to_terminal(table: Table, width: int | None = None) -> str:
    """The table within `width` columns; None: as wide as its numbers need. No number is ever broken or cut."""
    texts = [[plain_text(cell.text) for cell in row] for row in table.rows]
    heads = [plain_text(column) for column in table.columns]
    is_number = [table.is_number(i) for i in range(len(heads))]
    floors = _floors(table, heads, texts, is_number, width)
    optional = [table.columns.index(name) for name in table.optional if name in table.columns]
    body, left_out = layout(heads, texts, floors, is_number, optional, table.num_keys, width)
    notes = list(all_notes(table))
    if left_out:
        names = ", ".join(heads[i] for i in left_out)
        notes.append(f"not shown at {width} columns: {names}; a wider terminal shows them, every file has them.")
    lines = wrapped(plain_text(table.title), width) if table.title else []
    notes_lines = [line for note in notes for line in wrapped(plain_text(note), width, indent="  ")]
    return "\n".join([*lines, body.rstrip("\n"), *notes_lines, ""])


def _floors(
    table: Table, heads: Sequence[str], texts: Sequence[Sequence[str]], is_number: Sequence[bool], width: int | None
) -> list[int]:
    """The least width of every column; columns of `whole` are as wide as their texts where the width allows that."""
    columns = [[row[i] for row in texts] for i in range(len(heads))]
    floors = [_floor(head, column, number) for head, column, number in zip(heads, columns, is_number)]
    wide = [max([floor, *map(text_width, column)]) if name in table.whole else floor
            for name, floor, column in zip(table.columns, floors, columns)]  # fmt: skip
    kept = [size for name, size in zip(table.columns, wide) if name not in table.optional]
    return wide if width is None or sum(kept) + GAP * (len(kept) - 1) <= width else floors


def _floor(head: str, column: Sequence[str], is_number: bool) -> int:
    """The least width: numbers stay on one line, text is wrapped between words."""
    widest = max(map(text_width, column), default=0)
    least = widest if is_number else max([longest_piece(text) for text in column] + [min(widest, MIN_TEXT)])
    return max(least, longest_piece(head))


def to_md(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---:" if table.is_number(i) else "---" for i in range(len(table.columns))]
    lines = [f"### {_md(table.title)}", "", line([_md(column) for column in table.columns]), line(rule)]
    lines += [line([_md(cell.text) for cell in row]) for row in table.rows]
    notes = all_notes(table)
    return "\n".join([*lines, *([""] if notes else []), *(f"- {_md(note)}" for note in notes), ""])


def to_tex(table: Table) -> str:
    """A booktabs tabular with its caption; needs `\\usepackage{booktabs}`."""
    align = "".join("r" if table.is_number(i) else "l" for i in range(len(table.columns)))
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
        *(rf"\par\footnotesize {_tex(note)}" for note in all_notes(table)),
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
CSV_FIELDS = ("column", "value", "low", "high", "n", "p", "text", "footnote")


def to_csv(tables: Sequence[Table]) -> str:
    """All tables as one tidy table: a line a number, with its table, its row and the row's texts.

    Fields: table, row (from 1), the columns of text of all tables, column, value, low, high, n, p, text, footnote.
    `text` stands only where a cell of a column of numbers holds none; a row without numbers is one line.
    """
    labels = list(dict.fromkeys(name for table in tables for name in _label_names(table).values()))
    out = io.StringIO()
    writer = csv.DictWriter(out, ["table", "row", *labels, *CSV_FIELDS], restval="", lineterminator="\n")
    writer.writeheader()
    for table in tables:
        names, heads = _label_names(table), _unique(table.columns)
        numbers = [i for i in range(len(heads)) if table.is_number(i)]
        for number, row in enumerate(table.rows, 1):
            start: dict[str, object] = {"table": csv_text(table.name or table.title), "row": number}
            start |= {name: csv_text(_said(row[i])) for i, name in names.items()}
            for i in numbers:
                writer.writerow({**start, "column": csv_text(heads[i]), **_csv_number(row[i])})
            if not numbers:
                writer.writerow(start)
    return out.getvalue()


def csv_text(text: str) -> str:
    """A field that no spreadsheet runs as a formula: `=1+1` becomes `'=1+1`; a plain number stays one."""
    text = plain_text(text)
    is_formula = text.lstrip(" '\"").startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠"))
    return f"'{text}" if is_formula and not NUMBER.fullmatch(text) else text


def to_json(tables: Sequence[Table]) -> str:
    """`{"tables": [{"name", "title", "columns", "rows": [{column: text or {"value", "low", …}}], "notes"}]}`."""
    value = {"tables": [_json_table(table) for table in tables]}
    return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _json_table(table: Table) -> dict[str, object]:
    heads = _unique(table.columns)
    rows = [
        {head: _json_cell(cell, table.is_number(i)) for i, (head, cell) in enumerate(zip(heads, row))}
        for row in table.rows
    ]
    notes = [plain_text(note) for note in all_notes(table)]
    return {"name": table.name, "title": plain_text(table.title), "columns": heads, "rows": rows, "notes": notes}


def _json_cell(cell: Cell, is_number: bool) -> object:
    if not is_number:
        return plain_text(_said(cell)) or None
    found = {key: _finite(getattr(cell, key)) for key in ("value", "low", "high", "n", "p")}
    text = {"text": plain_text(cell.text)}
    footnote = {"footnote": plain_text(cell.footnote.text)} if cell.footnote else {}
    return {key: number for key, number in found.items() if number is not None or key == "value"} | text | footnote


def _csv_number(cell: Cell) -> dict[str, object]:
    found: dict[str, object] = {
        key: repr(number) for key in ("value", "low", "high", "n", "p") if (number := getattr(cell, key)) is not None
    }
    if cell.value is None:
        found["text"] = csv_text(_said(cell))
    return found | ({"footnote": csv_text(cell.footnote.text)} if cell.footnote else {})


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _said(cell: Cell) -> str:
    return "" if cell.text == NONE else cell.text


def _label_names(table: Table) -> dict[int, str]:
    """Columns of text by their place, without empty ones; a name that the file itself uses is told apart."""
    own = ("table", "row", *CSV_FIELDS)
    kept = [i for i in range(len(table.columns)) if not table.is_number(i) and any(_said(row[i]) for row in table.rows)]
    names = _unique(table.columns)
    return {i: f"{names[i] or 'name'}{' (label)' * (names[i] in own)}" for i in kept}


def _unique(names: Sequence[str]) -> list[str]:
    """Names of columns as keys: a second `x` is `x (2)`."""
    seen: Counter[str] = Counter()
    found = []
    for name in map(plain_text, names):
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def all_notes(table: Table) -> list[str]:
    """The table's own notes, then the footnotes of its cells, each once."""
    marked = [cell.footnote for row in table.rows for cell in row if cell.footnote]
    return list(dict.fromkeys([*table.notes, *(f"{note.mark} {note.text}" for note in marked)]))


RENDERERS: dict[str, Callable[[Table], str]] = {"terminal": to_terminal, "md": to_md, "tex": to_tex}
WHOLE: dict[str, Callable[[Sequence[Table]], str]] = {"csv": to_csv, "json": to_json}


def html_text(text: str) -> str:
    """Text as part of an HTML page or of an attribute in quotes."""
    return html.escape(plain_text(text))


def _md(text: str) -> str:
    """Text that Markdown shows as it is: no table break, no HTML, no emphasis by accident."""
    text = plain_text(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|~\[\]])", r"\\\1", text)


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$",
    "Δ": r"$\Delta$", "≤": r"$\le$", "≥": r"$\ge$", "→": r"$\rightarrow$", "†": r"\dag{}", "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in plain_text(text))
