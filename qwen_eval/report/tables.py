"""Tables from run directories: every run, models × tasks, the model cards' layouts, and what could not be used."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from qwen_eval.core import Metric
from qwen_eval.report.long_context import tables as long_context
from qwen_eval.report.profile import profile_tables
from qwen_eval.report.references import NOTE, column, differences
from qwen_eval.report.runs import RunSet, base_name, order, precision_rank
from qwen_eval.report.settings import Footnotes, by_task, checkpoint_of, run_names, settings, settings_text, with_runs
from qwen_eval.runs.run import Run
from qwen_eval.tables import NONE, Cell, Table, metric_cell, number_cell, text_cell

CATEGORIES = ("stem", "socialsciences", "socialscience", "humanities", "other", "others", "hard", "chinaspecific")
NamedRuns = tuple[tuple[str, ...], dict[str, Run]]  # what names it, its run of each task


def layouts(runs: RunSet) -> dict[str, Callable[[], list[Table]]]:
    """Name -> how to make it; each gives no table where no run has what it shows."""

    @cache
    def deltas() -> Mapping[Path, Cell]:
        return differences(runs.finished)

    return {
        "models": lambda: models_by_tasks(runs.finished, deltas()),
        "runs": lambda: every_run(runs, deltas()),
        "quantization": lambda: quantization(runs.finished, deltas()),
        "categories": lambda: categories(runs.finished),
        "long": lambda: long_context(runs.finished),
        "profile": lambda: profile(runs.profiles),
        "groups": lambda: by_group(runs.finished),
        "problems": lambda: problems(runs),
    }


def every_run(runs: RunSet, deltas: Mapping[Path, Cell]) -> list[Table]:
    """One row a run: score, interval, n, settings, how often answers were cut or unreadable, state."""
    if not runs.evals:
        return []
    members = sorted(runs.evals, key=order)
    footnotes = Footnotes(members)
    columns: tuple[str, ...] = (
        "model", "precision", "task", "metric", "score", "n", "settings", "truncated", "no answer", "state",
    )  # fmt: skip
    rows = tuple(_run_row(run, footnotes) for run in members)
    beside = column(deltas, members)
    notes = () if beside is None else (NOTE,)
    if beside is not None:
        columns = (*columns[:5], "Δ", *columns[5:])
        rows = tuple((*row[:5], delta, *row[5:]) for row, delta in zip(rows, beside))
    optional = ("metric", "no answer", "truncated", "settings")
    table = Table(
        name="runs", title="Every run", columns=columns, rows=rows, notes=notes, optional=optional, num_keys=3
    )
    return [with_runs(table, run_names([(f"{run.label} {run.variant} {run.task}", [run]) for run in members]), at=2)]


def _run_row(run: Run, footnotes: Footnotes) -> tuple[Cell, ...]:
    name, metric = run.headline or ("", None)
    metric = metric if run.status in ("complete", "partial") else None
    tone = {"complete": "", "partial": "weak"}.get(run.status, "bad")
    return (
        text_cell(run.label, title=str(run.path)), text_cell(run.variant), text_cell(run.task), text_cell(name),
        metric_cell(metric, footnote=footnotes.of(run) if metric else None), number_cell(run.num_samples, 0),
        text_cell(settings_text(settings(run)) or "default"), _rate(run, "truncated"), _rate(run, "no_answer"),
        text_cell(run.status_note, tone=tone),
    )  # fmt: skip


def models_by_tasks(runs: Sequence[Run], deltas: Mapping[Path, Cell]) -> list[Table]:
    """Headline scores in per cent, tasks in the order of the model cards; a row is one checkpoint. A cell whose
    settings differ from those of most runs of its column is footnoted."""
    if not runs:
        return []
    rows = _grid(runs, lambda run: (run.label, run.variant))
    return [_wide("models", "Models × tasks", rows, runs, deltas)]


def quantization(runs: Sequence[Run], deltas: Mapping[Path, Cell]) -> list[Table]:
    """Variants of one model under each other, as in the cards' table of quantized models."""
    variants: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        variants[base_name(run.model)].add(run.variant)
    kept = [run for run in runs if len(variants[base_name(run.model)]) > 1 and _is_precision(run.tag)]
    if not kept:
        return []
    rows = _grid(kept, lambda run: (base_name(run.model), run.variant))
    rows.sort(key=lambda row: (row[0][0], precision_rank(row[0][1])))
    return [_wide("quantization", "Precisions of one model", rows, kept, deltas)]


def _is_precision(tag: str) -> bool:
    """A run that no tag sets apart, or one of `+experiment=bnb_table`."""
    return tag == "default" or tag.startswith("precision-")


def categories(runs: Sequence[Run]) -> list[Table]:
    """Per task the headline and its categories (STEM ...), as in the cards' MMLU and C-Eval tables."""
    tables = []
    for task, members in by_task(runs):
        members = sorted(members, key=order)
        names = _ordered(name for run in members for name in run.metrics if _is_category(name))
        if not names:
            continue
        footnotes, rows = Footnotes(members), []
        for run in members:
            head = metric_cell(run.headline[1] if run.headline else None, footnote=footnotes.of(run))
            cells = [metric_cell(run.metrics.get(name)) for name in names]
            rows.append((text_cell(run.label), text_cell(run.variant), head, *cells))
        columns = ("model", "precision", "average", *(name.rpartition("/")[2].replace("_", " ") for name in names))
        title = f"{task} by category ({footnotes.column(task)})"
        table = Table(name=f"categories-{task}", title=title, columns=columns, rows=tuple(rows), num_keys=2)
        tables.append(with_runs(table, _names_of(members), at=2))
    return tables


def by_group(runs: Sequence[Run]) -> list[Table]:
    """Per task its groups (subjects, BBH's tasks), one a row, models side by side."""
    tables = []
    for task, members in by_task(runs):
        members = sorted(members, key=order)
        names = _ordered(name for run in members for name in run.metrics if _is_group(name))
        if not names:
            continue
        footnotes, places = Footnotes(members), _names_of(members) or [""] * len(members)
        columns = ["group"]
        for run, place in zip(members, places):
            columns.append(f"{run.label} {run.variant}{f' ({place})' * bool(place)}{footnotes.mark(run)}")
        rows = tuple((text_cell(n.partition("/")[2]), *(metric_cell(r.metrics.get(n)) for r in members)) for n in names)
        title = f"{task} by group ({footnotes.column(task)})"
        table = Table(name=f"groups-{task}", title=title, columns=tuple(columns), rows=rows, notes=footnotes.notes)
        tables.append(table)
    return tables


def profile(runs: Sequence[Run]) -> list[Table]:
    """Speed and memory: a row a measured cell of a profile's `cells` (docs/reports.md says what a cell holds)."""
    return profile_tables(sorted(runs, key=order))


def problems(runs: RunSet) -> list[Table]:
    """Directories that no table above uses, each by name with the reason."""
    rows = [
        (text_cell(item.path), text_cell("unreadable", tone="bad"), text_cell(item.reason)) for item in runs.unreadable
    ]
    reasons = {
        "unfinished": "the same command resumes it",
        "failed": "it has no score",
        "foreign": "not written by this program's evaluation",
    }
    for run in runs.evals:
        if run.status in reasons:
            rows.append((text_cell(run.path), text_cell(run.status_note, tone="bad"), text_cell(_reason(run, reasons))))
    if not rows:
        return []
    return [Table(name="problems", title="Not used", columns=("directory", "state", "why"), rows=tuple(rows))]


# --- pieces ----------------------------------------------------------------------------------------------------------


def _names_of(runs: Sequence[Run]) -> list[str] | None:
    return run_names([(f"{run.label} {run.variant}", [run]) for run in runs])


def _wide(name: str, title: str, rows: Sequence[NamedRuns], runs: Sequence[Run], deltas: Mapping[Path, Cell]) -> Table:
    """A column a task, and beside it the differences to the reference where a model has several rows."""
    footnotes = Footnotes(runs)
    columns = {"model": [text_cell(labels[0]) for labels, _ in rows]}
    columns["precision"] = [text_cell(labels[1]) for labels, _ in rows]
    notes: tuple[str, ...] = ()
    for task, _ in by_task(runs):
        members = [cells.get(task) for _, cells in rows]
        columns[f"{task} ({footnotes.column(task)})"] = [_score(run, footnotes) for run in members]
        beside = column(deltas, members)
        if beside is not None:
            columns[f"Δ {task}"], notes = beside, (NOTE,)
    table = Table(
        name=name, title=title, columns=tuple(columns), rows=tuple(zip(*columns.values())), notes=notes, num_keys=2
    )
    return with_runs(table, run_names([(" ".join(labels), list(cells.values())) for labels, cells in rows]), at=2)


def _score(run: Run | None, footnotes: Footnotes) -> Cell:
    if run is None or run.headline is None:
        return Cell(text=NONE)
    cell = metric_cell(run.headline[1], footnote=footnotes.of(run))
    return replace(cell, title=f"{run.headline[0]}, {cell.title}; {run.path}")


def _grid(runs: Sequence[Run], named: Callable[[Run], tuple[str, ...]]) -> list[NamedRuns]:
    """A row a checkpoint; a second run of the same task opens a further row instead of hiding the first."""
    rows: dict[tuple[object, ...], NamedRuns] = {}
    for run in sorted(runs, key=order):
        key, repeat = (named(run), checkpoint_of(run)), 0
        while run.task in rows.setdefault((key, repeat), (named(run), {}))[1]:
            repeat += 1
        rows[key, repeat][1][run.task] = run
    return list(rows.values())


def _is_group(name: str) -> bool:
    return "/" in name and not _is_category(name) and not _is_length(name)


def _is_length(name: str) -> bool:
    return name.rpartition("/")[2].isdecimal()  # ppl/1024, bits_per_byte/1024: the long-context table's business


def _is_category(name: str) -> bool:
    return "/" in name and re.sub(r"[^a-z]", "", name.rpartition("/")[2].lower()) in CATEGORIES


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _rate(run: Run, name: str) -> Cell:
    metric: Metric | None = run.rates.get(name)
    if metric is None:
        return Cell(text=NONE)
    tone = "bad" if metric.value >= 0.05 else ""
    return replace(metric_cell(metric), text=f"{metric.value * 100:.1f} %", tone=tone)


def _reason(run: Run, reasons: Mapping[str, str]) -> str:
    return str(run.result.get("error") or reasons[run.status])
