"""One self-contained HTML file: tables, plots and a sample browser. It loads nothing and runs one script, by its hash.

What a model wrote reaches the page only as JSON inside a script element and is shown by `textContent`; the content
security policy forbids every request and every other script, should that ever fail.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from qwen_eval.core import JSON, QwenEvalError
from qwen_eval.report.plots import plots
from qwen_eval.report.runs import RunSet, find_runs
from qwen_eval.report.samples import embeddable, sample_data
from qwen_eval.tables import Cell, Table, all_notes, html_text

HERE = Path(__file__).parent
MIN_FILTER_ROWS = 5  # shorter tables need no filter box


def page(title: str, tables: Sequence[Table], roots: Sequence[str], *, max_samples: int = 20_000) -> str:
    """The whole document. `roots`: run directories whose samples and plots it carries."""
    runs = find_runs(roots) if roots else RunSet(runs=(), unreadable=())
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    drawn, data = plots(runs), _samples(runs, max_samples)
    has_samples = bool(data["runs"])
    body = [_header(title, has_plots=bool(drawn), has_samples=has_samples)]
    body += ['<main><section id="tables">', *(_table(table, i) for i, table in enumerate(tables)), "</section>"]
    if drawn:
        body += ['<section id="plots"><h2>Plots</h2><div class="plots">', *(_figure(*plot) for plot in drawn)]
        body.append("</div></section>")
    if has_samples:
        body.append('<section id="samples"><h2>Samples</h2><div id="browser"></div></section>')
    body.append("</main>")
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{html_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
        *body,
        f'<script type="application/json" id="data">{embeddable(data)}</script>',
        f"<script>{script}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def _samples(runs: RunSet, max_samples: int) -> dict[str, JSON]:
    readable = []
    for run in runs.evals:
        try:
            _ = run.records
        except QwenEvalError:
            continue  # the table of problems names it
        readable.append(run)
    return sample_data(readable, max_samples=max_samples)


def _header(title: str, *, has_plots: bool, has_samples: bool) -> str:
    links = [("tables", "Tables", True), ("plots", "Plots", has_plots), ("samples", "Samples", has_samples)]
    listed = "".join(f'<a href="#{name}">{text}</a>' for name, text, is_there in links if is_there)
    toggle = '<button id="theme" type="button" aria-label="Light or dark" title="Light or dark">◐</button>'
    return f"<header><h1>{html_text(title)}</h1><nav>{listed}{toggle}</nav></header>"


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{html_text(title)}</figcaption>{svg}</figure>"


def _table(table: Table, index: int) -> str:
    numeric = [any(row[i].value is not None for row in table.rows) for i in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{_class("n" if is_number else "")}><button type="button">{_heading(column)}</button></th>'
        for column, is_number in zip(table.columns, numeric)
    )
    rows = "\n".join(f"<tr>{''.join(_cell(cell, n) for cell, n in zip(row, numeric))}</tr>" for row in table.rows)
    notes = "".join(f"<li>{html_text(note)}</li>" for note in all_notes(table))
    box = ""
    if len(table.rows) >= MIN_FILTER_ROWS:
        box = f'<input type="search" class="filter" placeholder="Filter {len(table.rows)} rows" aria-label="Filter">'
    anchor = html_text(table.name or f"table-{index}")
    return (
        f'<article class="table" id="{anchor}"><div class="bar"><h2>{html_text(table.title)}</h2>'
        f'{box}</div><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</article>"
    )


def _heading(column: str) -> str:
    """`"mmlu (5-shot, test)"`: what is in brackets goes small into a second line."""
    name, bracket, rest = column.partition(" (")
    return f"{html_text(name)}<small>{html_text(rest.removesuffix(')'))}</small>" if bracket else html_text(column)


def _cell(cell: Cell, is_number: bool) -> str:
    value = "" if cell.value is None else f' data-v="{cell.value!r}"'
    title = f' title="{html_text(cell.title)}"' if cell.title else ""
    return f"<td{_class('n' if is_number else '', cell.tone)}{value}{title}>{html_text(cell.text)}</td>"


def _class(*names: str) -> str:
    listed = " ".join(name for name in names if name)
    return f' class="{listed}"' if listed else ""
