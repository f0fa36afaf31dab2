"""Tables from run directories: every run, models × tasks, the model cards' layouts, and what could not be used."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from qwen_eval.core import JSON, Metric
from qwen_eval.report.references import NOTE, column, differences
from qwen_eval.report.runs import (
    FACETS,
    LoadedRun,
    RunSet,
    base_name,
    facet_text,
)
from qwen_eval.tables import NONE, Cell, Table, metric_cell, number_cell, text_cell

CARD_ORDER = ("mmlu", "ceval", "gsm8k", "math", "humaneval", "mbpp", "bbh", "cmmlu")  # the columns of the base table
CATEGORIES = ("stem", "socialsciences", "socialscience", "humanities", "other", "others", "hard", "chinaspecific")
MARKS = "abcdefghijklmnopqrstuvwxyz"
MANY = 60  # rows of a by-group table


def layouts(runs: RunSet) -> dict[str, Callable[[], list[Table]]]:
    """Name -> how to make it; each gives no table where no run has what it shows."""

    @cache
    def deltas() -> Mapping[Path, Cell]:
        return differences(runs.finished, _order)

    return {
        "models": lambda: models_by_tasks(runs.finished, deltas()),
        "runs": lambda: every_run(runs, deltas()),
        "quantisation": lambda: quantisation(runs.finished, deltas()),
        "categories": lambda: categories(runs.finished),
        "long": lambda: long_context(runs.finished),
        "profile": lambda: profile(runs.profiles),
        "groups": lambda: by_group(runs.finished),
        "problems": lambda: problems(runs),
    }


def every_run(runs: RunSet, deltas: Mapping[Path, Cell]) -> list[Table]:
    """One row a run: score, interval, n, protocol, how often answers were cut or unreadable, state."""
    if not runs.evals:
        return []
    columns: tuple[str, ...] = (
        "model", "precision", "task", "metric", "score", "n", "protocol", "truncated", "no answer", "state",
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    members = sorted(runs.evals, key=_order)
    for run in members:
        name, metric = run.headline or ("", None)
        state = run.status_note
        rows.append((
            text_cell(run.label, title=str(run.path)), text_cell(run.variant), text_cell(run.task), text_cell(name),
            metric_cell(metric if run.status in ("complete", "partial") else None),
            number_cell(run.num_samples, 0), text_cell(facet_text(run.facets) or "default"),
            _rate(run, "truncated"), _rate(run, "no_answer"),
            text_cell(state, tone="" if state == "complete" else "weak" if run.status == "partial" else "bad"),
        ))  # fmt: skip
    notes: tuple[str, ...] = ()
    found = column(deltas, members)
    if found is not None:  # beside the score
        columns, notes = (*columns[:5], "Δ", *columns[5:]), (NOTE,)
        rows = [(*row[:5], delta, *row[5:]) for row, delta in zip(rows, found)]
    return [Table(name="runs", title="Every run", columns=columns, rows=tuple(rows), notes=notes)]


def models_by_tasks(runs: Sequence[LoadedRun], deltas: Mapping[Path, Cell]) -> list[Table]:
    """Headline scores in per cent, tasks in the order of the model cards. A cell of another kind than its column's
    most common one (protocol, shots, split, limit, data) wears a letter, and the letter is explained below."""
    if not runs:
        return []
    rows = [((text_cell(label), text_cell(variant)), cells) for (label, variant), cells in _grid(runs, _row_key)]
    return [_wide("models", "Models × tasks", ("model", "precision"), rows, runs, deltas)]


def quantisation(runs: Sequence[LoadedRun], deltas: Mapping[Path, Cell]) -> list[Table]:
    """Variants of one model under each other, as in the cards' table of quantised models."""
    variants: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        variants[base_name(run.model)].add(run.variant)
    kept = [run for run in runs if len(variants[base_name(run.model)]) > 1 and run.tag == "default"]
    if not kept:
        return []
    grid = _grid(kept, lambda run: (base_name(run.model), run.variant))
    rows = [((text_cell(model), text_cell(variant)), cells) for (model, variant), cells in grid]
    rows.sort(key=lambda row: (row[0][0].text, precision_rank(row[0][1].text)))
    return [_wide("quantisation", "Precisions of one model", ("model", "precision"), rows, kept, deltas)]


def categories(runs: Sequence[LoadedRun]) -> list[Table]:
    """Per task the headline and its categories (STEM ...), as in the cards' MMLU and C-Eval tables."""
    tables = []
    for task, members in _by_task(runs):
        names = _ordered(name for run in members for name in run.metrics if _is_category(name))
        if not names:
            continue
        rows = []
        marks = Marks(members)
        for run in sorted(members, key=_order):
            head = run.headline[1] if run.headline else None
            cells = [metric_cell(run.metrics.get(name)) for name in names]
            rows.append((text_cell(run.label), text_cell(run.variant), metric_cell(head, mark=marks.of(run)), *cells))
        columns = ("model", "precision", "average", *(name.rpartition("/")[2].replace("_", " ") for name in names))
        title = f"{task} by category ({marks.column(task)})"
        tables.append(
            Table(name=f"categories-{task}", title=title, columns=columns, rows=tuple(rows), notes=marks.notes)
        )
    return tables


def by_group(runs: Sequence[LoadedRun]) -> list[Table]:
    """Per task its groups (subjects, BBH's tasks), one a row, models side by side."""
    tables = []
    for task, members in _by_task(runs):
        members = sorted(members, key=_order)
        names = _ordered(
            n for run in members for n in run.metrics if "/" in n and not _is_category(n) and not _is_length(n)
        )
        if not names:
            continue
        marks = Marks(members)
        heads = [f"{run.label} {run.variant}{marks.of(run)}" for run in members]
        rows = tuple((text_cell(n.partition("/")[2]), *(metric_cell(r.metrics.get(n)) for r in members)) for n in names)
        title = f"{task} by group ({marks.column(task)})"
        columns = ("group", *heads)
        tables.append(Table(name=f"groups-{task}", title=title, columns=columns, rows=rows, notes=marks.notes))
    return tables


def long_context(runs: Sequence[LoadedRun]) -> list[Table]:
    """Perplexity by length, as in the cards' ablation, and what each trick changed."""
    from qwen_eval.report.long_context import tables

    return tables(runs)


def profile(runs: Sequence[LoadedRun]) -> list[Table]:
    """Speed and memory: a row a measured cell of a profile's `cells` (docs/reports.md says what a cell holds)."""
    from qwen_eval.report.profile import profile_tables

    return profile_tables(sorted(runs, key=_order))


def problems(runs: RunSet) -> list[Table]:
    """Directories that no table above uses, each by name with the reason."""
    rows = [
        (text_cell(item.path), text_cell("unreadable", tone="bad"), text_cell(item.reason)) for item in runs.unreadable
    ]
    reasons = {
        "unfinished": "the same command goes on from there",
        "failed": "no number came out",
        "foreign": "not written by this program's evaluation",
    }
    for run in runs.evals:
        if run.status in reasons:
            rows.append((text_cell(run.path), text_cell(run.status_note, tone="bad"), text_cell(_reason(run, reasons))))
    if not rows:
        return []
    return [Table(name="problems", title="Not used", columns=("directory", "state", "why"), rows=tuple(rows))]


# --- pieces ----------------------------------------------------------------------------------------------------------


class Marks:
    """Letters for runs that are not of their column's most common kind."""

    def __init__(self, runs: Sequence[LoadedRun], *, across_tasks: bool = False) -> None:
        self._common: dict[str, tuple[dict[str, JSON], str | None]] = {}
        self._letters: dict[str, str] = {}
        self._across = across_tasks
        for task, members in _by_task(runs):
            counts = Counter(repr(_kind(run)) for run in members)
            best = max(members, key=lambda run: (counts[repr(_kind(run))], run.status == "complete"))
            self._common[task] = _kind(best)

    def column(self, task: str) -> str:
        return facet_text(self._common[task][0]) or "default protocol"

    def of(self, run: LoadedRun) -> str:
        """`" [a]"`, or nothing for a run of the column's kind."""
        facets, data = self._common[run.task]
        mine, my_data = _kind(run)
        changes = [
            f"{key} {_shown(mine[key])} (column: {_shown(facets[key])})" for key in FACETS if mine[key] != facets[key]
        ]
        if data != my_data:
            changes.append("other data")
        if not changes:
            return ""
        text = ("" if self._across else f"{run.task}: ") + ", ".join(changes)
        letter = self._letters.setdefault(text, MARKS[len(self._letters) % 26] * (1 + len(self._letters) // 26))
        return f" [{letter}]"

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"[{letter}] not of the column's kind: {text}" for text, letter in self._letters.items())


def _wide(
    name: str,
    title: str,
    head: tuple[str, ...],
    rows: Sequence[tuple[tuple[Cell, ...], Mapping[str, LoadedRun]]],
    runs: Sequence[LoadedRun],
    deltas: Mapping[Path, Cell],
) -> Table:
    """A column a task, and beside it the differences to the reference where a model has several rows."""
    marks = Marks(runs)
    tasks = [task for task, _ in _by_task(runs)]
    columns, body, has_deltas = list(head), [list(labels) for labels, _ in rows], False
    for task in tasks:
        members = [cells.get(task) for _, cells in rows]
        parts = [(f"{task} ({marks.column(task)})", [_score(run, marks) for run in members])]
        beside = column(deltas, members)
        if beside is not None:
            parts.append((f"Δ {task}", beside))
            has_deltas = True
        for title_of_column, cells_of_column in parts:
            columns.append(title_of_column)
            for row, cell in zip(body, cells_of_column):
                row.append(cell)
    notes = (*marks.notes, NOTE) if has_deltas else marks.notes
    return Table(name=name, title=title, columns=tuple(columns), rows=tuple(map(tuple, body)), notes=notes)


def _score(run: LoadedRun | None, marks: Marks) -> Cell:
    if run is None or run.headline is None:
        return Cell(text=NONE)
    cell = metric_cell(run.headline[1], mark=marks.of(run))
    return Cell(text=cell.text, value=cell.value, title=f"{run.headline[0]}, {cell.title}; {run.path}", tone=cell.tone)


def _grid(
    runs: Sequence[LoadedRun], key: Callable[[LoadedRun], tuple[str, str]]
) -> list[tuple[tuple[str, str], dict[str, LoadedRun]]]:
    """Rows by `key`; a second run of the same task opens a further row instead of hiding the first."""
    rows: dict[tuple[str, str, int], dict[str, LoadedRun]] = defaultdict(dict)
    for run in sorted(runs, key=_order):
        repeat = 0
        while run.task in rows[(*key(run), repeat)]:
            repeat += 1
        rows[(*key(run), repeat)][run.task] = run
    return [((label, variant), cells) for (label, variant, _), cells in rows.items()]


def _row_key(run: LoadedRun) -> tuple[str, str]:
    return run.label, run.variant


def _kind(run: LoadedRun) -> tuple[dict[str, JSON], str | None]:
    return run.facets, run.data_sha256


def _by_task(runs: Iterable[LoadedRun]) -> list[tuple[str, list[LoadedRun]]]:
    found: dict[str, list[LoadedRun]] = defaultdict(list)
    for run in runs:
        found[run.task].append(run)
    rank = {task: i for i, task in enumerate(CARD_ORDER)}
    return sorted(found.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0]))


def _order(run: LoadedRun) -> tuple[JSON, ...]:
    """Models by name with numbers as numbers, then precision, task, path."""
    return (*natural(run.label), precision_rank(run.variant), run.variant, run.task, str(run.path))


def natural(text: str) -> tuple[tuple[tuple[int, float, str], ...]]:
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return (tuple((0, float(p), "") if p[:1].isdigit() else (1, 0.0, p) for p in parts if p),)


def precision_rank(variant: str) -> int:
    order = ("FP32", "BF16", "FP16", "AUTO", "Int8", "LLM.int8", "Int4", "NF4")
    first = variant.partition(",")[0]
    return order.index(first) * 10 + variant.count(",") if first in order else 99


def _is_length(name: str) -> bool:
    return name.rpartition("/")[2].isdecimal()  # ppl/1024, bits_per_byte/1024: the long-context table's business


def _is_category(name: str) -> bool:
    return "/" in name and re.sub(r"[^a-z]", "", name.rpartition("/")[2].lower()) in CATEGORIES


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _rate(run: LoadedRun, name: str) -> Cell:
    metric: Metric | None = run.rates.get(name)
    if metric is None:
        return Cell(text=NONE)
    tone = "bad" if metric.value >= 0.05 else ""
    return Cell(text=f"{metric.value * 100:.1f} %", value=metric.value, tone=tone, title=metric_cell(metric).title)


def _spread(speeds: Sequence[float]) -> Cell:
    if not speeds:
        return Cell(text=NONE)
    ordered = sorted(speeds)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    text = f"{median:,.1f}" + (f" [{ordered[0]:,.1f}, {ordered[-1]:,.1f}]" if len(ordered) > 1 else "")
    return Cell(text=text, value=median, title=f"{len(ordered)} repeats")


def _seconds(value: JSON, scale: float) -> float | None:
    values = sorted(value) if isinstance(value, list) else [value]
    middle = values[len(values) // 2] if values else None
    return float(middle) * scale if isinstance(middle, (int, float)) else None


def _number(value: JSON) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _reason(run: LoadedRun, reasons: Mapping[str, str]) -> str:
    return str(run.result.get("error") or reasons[run.status])


def _shown(value: JSON) -> str:
    if value in (None, "", []):
        return "none"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
