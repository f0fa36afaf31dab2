"""Perplexity by context length: the cards' ablation table, what each trick changed, and the curves."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

from qwen_eval.core import JSON, ConfigError, Metric
from qwen_eval.figures import length_curves
from qwen_eval.report.compare import compare_sides
from qwen_eval.report.comparison import Margins, Side
from qwen_eval.report.gate import delta_cell
from qwen_eval.report.runs import base_name, natural, precision_rank
from qwen_eval.report.settings import Footnotes, run_names, with_runs
from qwen_eval.runs.run import Run, precision_name
from qwen_eval.tables import NONE, Table, metric_cell, text_cell
from qwen_eval.terminal import plain_text

LENGTH = re.compile(r"(?:ppl|perplexity)/(\d+)$")


def perplexities(run: Run) -> dict[int, Metric]:
    """Context length -> perplexity; empty for a run that has none."""
    return {int(found[1]): metric for name, metric in run.metrics.items() if (found := LENGTH.search(name))}


def tricks_of(run: Run) -> tuple[str, ...]:
    """What was on, as the engine says: `("NTK", "LogN", "window 256-2048")`; empty: positions as trained."""
    info = run.engine_info
    tricks = [name for name, key in (("NTK", "dynamic_ntk"), ("LogN", "logn")) if info.get(key)]
    windows = info.get("windows")
    if isinstance(windows, list) and windows:
        sizes = sorted({int(size) for size in windows if isinstance(size, int)})
        tricks.append("window " + "-".join(map(str, dict.fromkeys((sizes[0], sizes[-1])))))
    return tuple(tricks)


def tables(runs: Sequence[Run]) -> list[Table]:
    """One row a run, the fewest tricks first; then the changes within each model that has several rows."""
    kept = sorted((run for run in runs if perplexities(run)), key=_order)
    if not kept:
        return []
    lengths = _lengths(kept)
    footnotes, names = Footnotes(kept, across_tasks=True), row_names(kept)
    rows = []
    for run, name in zip(kept, names):
        found = perplexities(run)
        cells = [metric_cell(found.get(length), footnote=footnotes.of(run)) for length in lengths]
        rows.append((text_cell(name), text_cell(_precision(run)), text_cell(_tricks(run)), *cells))
    columns = ("model", "precision", "tricks", *map(str, lengths))
    table = Table(name="long", title="Perplexity by length", columns=columns, rows=tuple(rows), num_keys=3)
    alike = run_names([(f"{name} {_precision(run)} {_tricks(run)}", [run]) for run, name in zip(kept, names)])
    return [with_runs(table, alike, at=3), *changes(kept)]


def changes(runs: Sequence[Run]) -> list[Table]:
    """Change of perplexity between any two rows of one model that differ in precision or tricks, length by length."""
    families: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        families[base_name(run.model)].append(run)
    lengths, rows = _lengths(runs), []
    for model, members in families.items():
        for first, second in combinations([Side(run=run) for run in members], 2):
            names = [_change(name(first.run), name(second.run)) for name in (_precision, _tricks)]
            is_one_model = first.run.weights == second.run.weights or " → " in names[0]  # another precision, others
            if sum(" → " in name for name in names) != 1 or not is_one_model:
                continue
            comparison = compare_sides(first, second, Margins())
            found = dict(comparison.by_group)
            if comparison.difference is not None and len(lengths) == 1:
                found = {str(lengths[0]): comparison.difference}
            if found:
                cells = [delta_cell(comparison, found.get(str(length))) for length in lengths]
                rows.append((*map(text_cell, (model, *names)), *cells))
    if not rows:
        return []
    return [
        Table(
            name="long-changes", title="What each change does to the perplexity", rows=tuple(rows),
            columns=("model", "precision", "tricks", *map(str, lengths)),
            notes=("In per cent of the perplexity, 95 % intervals, paired over the documents; negative is better.",),
            num_keys=3,
        )
    ]  # fmt: skip


def _change(first: str, second: str) -> str:
    return first if first == second else f"{first} → {second}"


def curves(runs: Sequence[Run], form: str) -> bytes:
    """The same rows as a figure: svg or png."""
    kept = sorted((run for run in runs if len(perplexities(run)) > 1), key=_order)
    if not kept:
        raise ConfigError(f"out=….{form}: no run with perplexities of several lengths; see task=long_ppl")
    names = [plain_text(f"{name} {_precision(run)}, {_tricks(run)}") for run, name in zip(kept, row_names(kept))]
    return length_curves(dict(zip(names, map(perplexities, kept))), form)


def row_names(runs: Sequence[Run]) -> list[str]:
    """The model, with the tag of the run and its task where rows would else read alike."""
    counts = Counter((run.model, _precision(run), _tricks(run)) for run in runs)
    alike = [counts[run.model, _precision(run), _tricks(run)] > 1 for run in runs]
    return [f"{run.label}, {run.task}" if same else run.model for run, same in zip(runs, alike)]


def _order(run: Run) -> tuple[JSON, ...]:
    """Models by name, then precision, then the fewest tricks first."""
    precision = _precision(run)
    return natural(run.model), precision_rank(precision), len(tricks_of(run)), _tricks(run), str(run.path)


def _tricks(run: Run) -> str:
    """Only the native engine says what was on."""
    return " + ".join(tricks_of(run)) or ("plain" if "dynamic_ntk" in run.engine_info else NONE)


def _precision(run: Run) -> str:
    return precision_name(run.model_spec, run.engine_info)


def _lengths(runs: Sequence[Run]) -> list[int]:
    return sorted({length for run in runs for length in perplexities(run)})
