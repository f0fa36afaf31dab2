"""Quality against speed and memory, a point a checkpoint: one benchmark, one kind of cell. Other runs are left out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from qwen_eval.core import Metric
from qwen_eval.report.runs import ProfileCell, RunSet, device_name, profile_cells, speeds_of
from qwen_eval.report.settings import by_task, settings, settings_text
from qwen_eval.runs.run import Run

SHAPE = ("name", "batch", "prompt_tokens", "new_tokens")
Name = tuple[str, str]
Measured = dict[Name, tuple[Run, Sequence[float], float]]  # its profile, tokens/s of each repeat, peak bytes
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """One checkpoint: its score with the 95 % interval, the median speed with the range of its repeats, its memory."""

    name: str
    score: float
    tok_per_s: float
    peak_bytes: float
    score_ends: tuple[float, float] | None = None
    speed_ends: tuple[float, float] | None = None

    def beats(self, other: Tradeoff) -> bool:
        """As good in score, speed and memory, and better in one of them."""
        mine, theirs = ((p.score, p.tok_per_s, -p.peak_bytes) for p in (self, other))
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs))


@dataclass(frozen=True, kw_only=True)
class Tradeoffs:
    """`what` the scores are of; `notes` name what was left out, and why."""

    what: str = ""
    points: tuple[Tradeoff, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def front(self) -> tuple[Tradeoff, ...]:
        """The Pareto front, slowest first: points that no other beats in score, speed and memory."""
        kept = [point for point in self.points if not any(other.beats(point) for other in self.points)]
        return tuple(sorted(kept, key=lambda point: (point.tok_per_s, -point.score)))


def tradeoffs(runs: RunSet) -> Tradeoffs:
    """Points of the benchmark that most measured checkpoints have, with the settings that most of those runs have."""
    measured, notes = _measured(runs.profiles)
    scored = [run for run in runs.finished if _name(run) in measured and run.headline]
    tasks = by_task(run for run in scored if run.headline and run.headline[1].kind == "share")
    if not tasks:
        return Tradeoffs()
    task, members = max(tasks, key=lambda item: len({_name(run) for run in item[1]}))
    kept = _commonest(members, lambda run: json.dumps(settings(run), sort_keys=True))
    notes += [f"left out: {_said(run)}: other settings of {task}" for run in members if run not in kept]
    if len(tasks) > 1:
        notes.append(f"not shown: {', '.join(other for other, _ in tasks if other != task)}; scores are not averaged")
    points, left_out = _points(kept, measured)
    what = f"{task} ({settings_text(settings(kept[0])) or 'default protocol'})"
    return Tradeoffs(what=what, points=tuple(points), notes=tuple(dict.fromkeys([*notes, *left_out])))


def _points(runs: Sequence[Run], measured: Measured) -> tuple[list[Tradeoff], list[str]]:
    """One point a name with one run, and the names that have several or whose profile is of other weights."""
    runs_of: dict[Name, list[Run]] = defaultdict(list)
    for run in runs:
        runs_of[_name(run)].append(run)
    points, notes = [], []
    for name, (run, *others) in runs_of.items():
        profile, speeds, peak = measured[name]
        if others:
            notes.append(f"left out: {' '.join(name)}: {1 + len(others)} runs of {run.task}")
        elif not _is_same_checkpoint(run, profile):
            notes.append(f"left out: {' '.join(name)}: the profile is of other weights")
        elif run.headline:
            points.append(_point(" ".join(name), run.headline[1], speeds, peak))
    return points, notes


def _point(name: str, score: Metric, speeds: Sequence[float], peak: float) -> Tradeoff:
    return Tradeoff(
        name=name, score=score.value, tok_per_s=median(speeds), peak_bytes=peak,
        score_ends=None if score.low is None or score.high is None else (score.low, score.high),
        speed_ends=(min(speeds), max(speeds)) if len(speeds) > 1 else None,
    )  # fmt: skip


def _measured(profiles: Sequence[Run]) -> tuple[Measured, list[str]]:
    """(profile, tokens/s, peak bytes) of each name, all of one shape on one device; not of a name measured twice."""
    cells = [(run, cell) for run in profiles for cell in profile_cells(run) if cell.get("new_tokens")]
    cells = [(run, cell) for run, cell in cells if speeds_of(cell)]
    if not cells:
        return {}, []
    alike = _commonest(cells, lambda item: (device_name(item[0]), *(item[1].get(key) for key in SHAPE)))
    by_name: dict[Name, list[tuple[Run, ProfileCell]]] = defaultdict(list)
    for run, cell in alike:
        by_name[_name(run)].append((run, cell))
    twice = [name for name, found in by_name.items() if len(found) > 1]
    others = {_name(run) for run, _ in cells} - set(by_name)
    notes = [f"left out: {' '.join(name)}: measured {len(by_name[name])} times" for name in twice]
    notes += [f"left out: {' '.join(name)}: measured in other sizes or on another device" for name in sorted(others)]
    return {
        name: (run, speeds_of(cell), float(cell.get("peak_bytes") or 0))
        for name, ((run, cell), *_) in by_name.items()
        if name not in twice
    }, notes


def _commonest(items: Iterable[T], key_of: Callable[[T], Hashable]) -> list[T]:
    """The items that have the commonest key; the first of several such keys."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key_of(item)].append(item)
    return max(groups.values(), key=len)


def _name(run: Run) -> Name:
    return run.model, run.variant


def _said(run: Run) -> str:
    return f"{run.label} {run.variant} ({settings_text(settings(run)) or 'default protocol'})"


def _is_same_checkpoint(first: Run, second: Run) -> bool:
    """Unless both say which weights they are, names must do."""
    return not (first.weights and second.weights) or first.weights == second.weights
