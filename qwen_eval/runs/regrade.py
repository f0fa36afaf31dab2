"""Grade stored answers again, without the model.

The run is not changed; the new grades are written to `regrade-<protocol>.json` in its directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_eval.config import PROTOCOLS, not_one_of
from qwen_eval.core import (
    JSON,
    ConfigError,
    DataError,
    Grade,
    Metric,
    Record,
    Sample,
    StoreError,
    Task,
    Turn,
)
from qwen_eval.runs.evaluate import BOTH_READINGS, requests_sha256, selected, summary, task_context
from qwen_eval.runs.grading import grades
from qwen_eval.runs.provenance import provenance
from qwen_eval.runs.record_json import metrics_from_json
from qwen_eval.runs.run import Run, load_run
from qwen_eval.runs.store import differences, write_json
from qwen_eval.runs.stored import stored_config
from qwen_eval.runs.summary import metric_cells
from qwen_eval.tables import Table, text_cell
from qwen_eval.tasks.registry import build


@dataclass(kw_only=True)
class RegradeSpec:
    run: str = ""  # the directory of a finished run
    protocol: str | None = None  # null: the run's own, for another version of the task's grader


def check(spec: RegradeSpec) -> RegradeSpec:
    if not spec.run:
        raise ConfigError("pass run=DIR, the directory of a finished run")
    if spec.protocol is not None and spec.protocol not in PROTOCOLS:
        raise not_one_of("protocol", spec.protocol, PROTOCOLS)
    return spec


@dataclass(frozen=True, kw_only=True)
class Regraded:
    path: Path
    old: Mapping[str, Metric]
    new: Mapping[str, Metric]
    num_changed: int
    n: int
    warnings: Sequence[str]


def regrade(spec: RegradeSpec) -> Regraded:
    """Grade a finished run's answers again. StoreError when it is unfinished, DataError when its rows have changed.

    For another protocol nothing is extracted or run again if the records have the scores of both.
    """
    run = load_run(spec.run)
    if not run.result:
        raise StoreError(f"{run.path}: the run is not finished; resume it first with the same command")
    config = stored_config(run.spec)
    before, config.protocol = config.protocol, spec.protocol or config.protocol
    task = build(config.task, task_context(config, None))
    samples = selected(task, config)
    warnings = _check_same_questions(run, task, samples)
    needs_reading = spec.protocol is None or not _has_both_readings(run, task)
    records = _read_again(run, task, samples) if needs_reading else run.stored_records
    pairs = [(old.under(before), new.under(config.protocol)) for old, new in zip(run.stored_records, records)]
    changed = [old.sample_id for old, new in pairs if _reading(old.grade) != _reading(new.grade)]
    result = summary(task, samples, records, config)
    path = run.path / f"regrade-{config.protocol}.json"
    extra: dict[str, JSON] = {
        "protocol": config.protocol,
        "task_version": task.version,
        "changed": changed,
        "warnings": warnings,
    }
    write_json(path, {**result, **extra, "provenance": provenance()})
    new = metrics_from_json(result["metrics"])
    return Regraded(path=path, old=run.metrics, new=new, num_changed=len(changed), n=len(records), warnings=warnings)


def _has_both_readings(run: Run, task: Task) -> bool:
    """Whether the scores of both protocols are stored, and are those of the readers at hand."""
    is_stored = run.spec.get("readings") == BOTH_READINGS or run.protocol == "robust"
    is_current = run.decides.get("task_version") == task.version
    return is_stored and is_current and all(r.grade.score_upstream is not None for r in run.stored_records)


def _read_again(run: Run, task: Task, samples: Sequence[Sample]) -> tuple[Record, ...]:
    by_id = {sample.id: sample for sample in samples}
    asked = [(by_id[record.sample_id], _turns(task, by_id[record.sample_id], record)) for record in run.records]
    found = zip(run.stored_records, grades(task, asked))
    return tuple(dataclasses.replace(record, grade=grade) for record, grade in found)


def _check_same_questions(run: Run, task: Task, samples: Sequence[Sample]) -> list[str]:
    changes = differences(run.benchmark, dict(task.describe()))
    hashes = [change for change in changes if "sha256" in change.split(":")[0]]
    missing = {record.sample_id for record in run.records} - {sample.id for sample in samples}
    if hashes or missing:
        what = hashes[0] if hashes else f"{len(missing)} stored samples are no longer there"
        raise DataError(f"{run.path}: the benchmark's rows have changed since ({what}); regrade with the same rows")
    if requests_sha256(task, samples) != run.decides.get("requests_sha256"):
        return ["the task's prompts have changed: these are new grades of answers to the stored prompts"]
    return []


def _turns(task: Task, sample: Sample, record: Record) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for answer in record.answers:
        request = task.request(sample, tuple(turns))
        if request is None:
            raise StoreError(f"{record.sample_id}: the task now asks fewer questions than were answered; run it again")
        turns.append(Turn(request=request, answer=answer))
    return tuple(turns)


def _reading(grade: Grade) -> tuple[Any, Any]:
    return grade.score, grade.extracted


def regraded_table(outcome: Regraded) -> Table:
    rows = tuple(
        (text_cell(name), *(metric_cells(outcome.old[name])[:2] if name in outcome.old else (text_cell(None),) * 2),
         *metric_cells(metric))
        for name, metric in outcome.new.items()
    )  # fmt: skip
    columns = ("metric", "stored", "stored interval", "now", "95 % interval", "n")
    notes = tuple(f"warning: {warning}" for warning in outcome.warnings)
    optional = ("stored interval",)
    return Table(name="regraded", title="Graded again", columns=columns, rows=rows, notes=notes, optional=optional)
