"""One self-contained HTML file that leads with the decision: verdicts, plots, changed samples, then every table.

It loads nothing and runs one script, by its hash. What a model wrote reaches the page only as JSON inside a script
element and is shown by `textContent`; the content security policy forbids every request and every other script,
should that ever fail.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from qwen_eval.core import QwenEvalError
from qwen_eval.report.candidates import Candidate, candidates, in_order
from qwen_eval.report.comparison import Comparison
from qwen_eval.report.gate import TONES, delta_cell
from qwen_eval.report.plots import plots
from qwen_eval.report.runs import RunSet, find_runs
from qwen_eval.report.samples import embeddable, run_keys, sample_data
from qwen_eval.report.verdict import Judgement, shown
from qwen_eval.runs.run import Run
from qwen_eval.tables import NONE, Cell, Table, all_notes, html_text

HERE = Path(__file__).parent
MIN_FILTER_ROWS = 5  # shorter tables need no filter box
SHORT_TEXT = 24  # characters that a cell of text keeps on one line
LONG_TEXT = 40  # from here on a cell of text gets room
MAX_OPEN = 6  # lines of evidence that the first screen has room for
SIGNS = {"good": "✓", "bad": "✗", "open": "?"}
ORDER = ("bad", "open", "good")
FACTS = ("task", "by the margin", "Δ [95 %]", "margin", "n", "changed samples", "evidence")
NUMBERS = ("Δ [95 %]", "margin", "n")
Keys = Mapping[Path, str]


def page(
    title: str,
    tables: Sequence[Table],
    roots: Sequence[str],
    *,
    max_samples: int = 20_000,
    judgements: Sequence[Judgement] = (),
) -> str:
    """The whole document. `roots`: run directories whose samples and plots it carries."""
    runs = find_runs(roots) if roots else RunSet(runs=(), unreadable=())
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    judgements = in_order(judgements)
    readable, drawn = _readable(runs), plots(runs, judgements)
    data = sample_data(readable, max_samples=max_samples, comparisons=[j.comparison for j in judgements])
    verdicts = _verdicts(judgements, _linked(data, readable))
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{html_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
        *_body(title, tables, verdicts, drawn, bool(data["runs"])),
        f'<script type="application/json" id="data">{embeddable(data)}</script>',
        f"<script>{script}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _body(
    title: str, tables: Sequence[Table], verdicts: str, drawn: Sequence[tuple[str, str]], has_samples: bool
) -> list[str]:
    """The sections in the order of a decision. A page without a verdict begins with its first table."""
    lead, rest = ([], tables) if verdicts or not tables else (tables[:1], tables[1:])
    is_bare = not (drawn or has_samples)  # nothing but tables: none is folded
    sections = {
        "verdicts": ("Verdict", verdicts),
        "lead": ("", "".join(_table(table, 0, is_open=True) for table in lead)),
        "plots": ("Plots", f'<div class="plots">{"".join(_figure(*plot) for plot in drawn)}</div>' if drawn else ""),
        "samples": ("Samples", '<div id="browser"></div>' if has_samples else ""),
        "tables": ("Tables", "".join(_table(table, i, is_open=is_bare) for i, table in enumerate(rest, len(lead)))),
    }
    found = {name: content for name, content in sections.items() if content[1]}
    links = [(name, text) for name, (text, _) in found.items() if text]
    body = [_header(title, links), '<main id="main">']
    for name, (text, content) in found.items():
        body.append(f'<section id="{name}">{f"<h2>{text}</h2>" if text else ""}{content}</section>')
    return [*body, "</main>"]


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def _readable(runs: RunSet) -> list[Run]:
    readable = []
    for run in runs.evals:
        try:
            _ = run.records
        except QwenEvalError:
            continue  # the table of problems names it
        if run.records:
            readable.append(run)
    return readable


def _header(title: str, links: Sequence[tuple[str, str]]) -> str:
    listed = "".join(f'<a href="#{name}">{text}</a>' for name, text in links)
    toggle = '<button id="theme" type="button" aria-label="Light or dark" title="Light or dark">◐</button>'
    return f"<header><h1>{html_text(title)}</h1><nav>{listed}{toggle}</nav></header>"


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{html_text(title)}</figcaption>{svg}</figure>"


# --- verdicts --------------------------------------------------------------------------------------------------------


def _linked(data: Mapping[str, object], runs: Sequence[Run]) -> Keys:
    """Keys of the runs whose changed samples the page can show: those with a reference in it."""
    rows = data["runs"]
    assert isinstance(rows, list)
    linked = {row["key"] for row in rows if row.get("reference")}
    return {path: key for path, key in run_keys(runs).items() if key in linked}


def _verdicts(judgements: Sequence[Judgement], keys: Keys) -> str:
    found = sorted(candidates(judgements), key=lambda candidate: ORDER.index(candidate.tone))
    is_open = sum(len(candidate.judgements) for candidate in found) <= MAX_OPEN
    return "".join(_verdict(candidate, keys, is_open=is_open) for candidate in found)


def _verdict(candidate: Candidate, keys: Keys, *, is_open: bool) -> str:
    """One line with the answer, and under it a line of evidence a task."""
    reference, arrow, name = candidate.name.partition(" → ")
    name, against = (name, f"against {reference}") if arrow else (reference, "against its reference")
    head = "".join(f"<th{_class('n' * (fact in NUMBERS))}>{fact}</th>" for fact in FACTS)
    evidence = "".join(_evidence(judgement, keys) for judgement in candidate.judgements)
    return (
        f'<details class="verdict is-{candidate.tone}"{" open" * is_open}><summary>'
        f'<span class="sign" aria-hidden="true">{SIGNS[candidate.tone]}</span> <b>{html_text(name)}</b> '
        f'<span class="weak">{html_text(against)}</span> <strong>{html_text(candidate.text)}</strong>'
        f'<span class="brief weak">{html_text(_brief(candidate))}</span></summary>'
        f'<div class="scroll"><table class="evidence"><thead><tr>{head}</tr></thead><tbody>{evidence}</tbody>'
        "</table></div></details>"
    )


def _brief(candidate: Candidate) -> str:
    """The evidence of a folded verdict in one line: the worst task, and how many samples changed in all."""
    worst, found = candidate.worst, [j.comparison for j in candidate.quality]
    c, d, num = worst.comparison, worst.comparison.difference, len(candidate.judgements)
    said = worst.why if d is None else f"Δ {delta_cell(c, d).text}, margin {shown(c, c.margin)}, n = {d.n:,}"
    said = f"the worst of {num} comparisons is {c.task}: {said}" if num > 1 else f"{c.task}: {said}"
    return f"{said}; {_flips(found)}" if any(c.flips for c in found) else said


def _flips(found: Sequence[Comparison]) -> str:
    return f"{sum(c.losses for c in found):,} lost, {sum(c.gains for c in found):,} gained"


def _evidence(judgement: Judgement, keys: Keys) -> str:
    c, decision = judgement.comparison, judgement.decision
    what = f"{c.task} {c.label.removeprefix(c.pair).lstrip(', ')}" if c.pair else c.task
    texts = (
        html_text(what), html_text(decision.text if decision else judgement.verdict),
        html_text(delta_cell(c, c.difference).text), html_text(shown(c, c.margin) if c.margin else NONE),
        f"{c.difference.n:,}" if c.difference else NONE, _changed(judgement, keys), html_text(judgement.why),
    )  # fmt: skip
    tones = {"by the margin": TONES[judgement.verdict], "evidence": "long"}
    cells = [
        f'<td{_class("n" * (fact in NUMBERS), tones.get(fact, ""))} data-label="{fact}">{text}</td>'
        for fact, text in zip(FACTS, texts)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _changed(judgement: Judgement, keys: Keys) -> str:
    """`12 lost, 8 gained`, each a link into the samples where the page carries them."""
    c = judgement.comparison
    key = keys.get(c.paths[1], "") if len(c.paths) == 2 else ""
    counts = [(c.losses, "lost"), (c.gains, "gained"), (len(c.rewritten), "reworded")]
    said = [
        f'<a href="#{quote(key)}/?show={kind}">{num:,} {kind}</a>' if key else f"{num:,} {kind}"
        for num, kind in counts
        if num
    ]
    return ", ".join(said) or ("none" if c.family == "share" and not c.not_comparable else NONE)


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(table: Table, index: int, *, is_open: bool) -> str:
    numeric = [table.is_number(i) for i in range(len(table.columns))]
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
    size = f"{len(table.rows):,} row{'s' * (len(table.rows) != 1)}"
    return (
        f'<details class="table" id="{anchor}"{" open" * is_open}><summary><h3>{html_text(table.title)}</h3> '
        f'<span class="weak">{size}</span></summary>{box}'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</details>"
    )


def _heading(column: str) -> str:
    """`"mmlu (5-shot, test)"`: what is in brackets goes small into a second line."""
    name, bracket, rest = column.partition(" (")
    return f"{html_text(name)}<small>{html_text(rest.removesuffix(')'))}</small>" if bracket else html_text(column)


def _cell(cell: Cell, is_number: bool) -> str:
    value = "" if cell.value is None else f' data-v="{cell.value!r}"'
    title = f' title="{html_text(cell.title)}"' if cell.title else ""
    room = "n" if is_number else "short" if len(cell.text) <= SHORT_TEXT else "long" * (len(cell.text) >= LONG_TEXT)
    return f"<td{_class(room, cell.tone)}{value}{title}>{html_text(cell.text)}</td>"


def _class(*names: str) -> str:
    listed = " ".join(name for name in names if name)
    return f' class="{listed}"' if listed else ""
