"""The paired difference of each variant of a model to its reference, shown beside their scores.

Two separate intervals hide it: most of their width comes from which items were drawn, which both runs share.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qwen_eval.core import QwenEvalError
from qwen_eval.report.compare import compare_sides
from qwen_eval.report.comparison import Margins, Side
from qwen_eval.report.gate import delta_cell
from qwen_eval.report.runs import base_name, precision_rank
from qwen_eval.runs.run import Run
from qwen_eval.tables import Cell, text_cell

NOTE = "Δ: paired difference to the model's reference [95 %], points of a share, per cent of a perplexity."


def differences(runs: Sequence[Run]) -> dict[Path, Cell]:
    """Path of a run -> its Δ to the run of the highest precision of that model and task; nothing for a model alone."""
    found: dict[Path, Cell] = {}
    sides: dict[Path, Side] = {}  # a reference's answers are read once
    for reference, run in pairs(runs):
        first = sides.setdefault(reference.path, Side(run=reference))
        found[reference.path] = text_cell("reference", tone="weak")
        found[run.path] = _difference(first, run)
    return found


def pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """(reference, run) for every run of a model and task but the one of the highest precision."""
    members: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=_rank):
        members[run.task, base_name(run.model)].append(run)
    return [(reference, run) for reference, *others in members.values() for run in others]


def column(cells: Mapping[Path, Cell], runs: Sequence[Run | None]) -> list[Cell] | None:
    """One cell a run; None where no run has a difference, so that no empty column is shown."""
    found = [cells.get(run.path) if run else None for run in runs]
    if not any(found):
        return None
    return [cell or text_cell(None) for cell in found]


def _difference(first: Side, run: Run) -> Cell:
    try:
        comparison = compare_sides(first, Side(run=run), Margins())
    except (QwenEvalError, OSError) as error:
        return text_cell(None, title=str(error))
    difference = comparison.difference
    if difference is None or math.isnan(difference.delta):
        return text_cell(None, title="; ".join(comparison.not_comparable) or "no score per sample")
    cell = delta_cell(comparison, difference)
    reference = f"to {first.run.label} {first.run.variant}, {first.run.path}"
    flips = f"{comparison.losses} lost, {comparison.gains} gained"
    return replace(cell, title=f"{reference}: {cell.title}; {flips}")


def _rank(run: Run) -> tuple[int, bool, str]:
    """The reference first: highest precision with the fewest switches, the default tag."""
    return precision_rank(run.variant), run.tag != "default", str(run.path)
