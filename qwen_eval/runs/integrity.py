"""Checks that a finished run is intact: its files are unchanged, and its records give its result.json.

Every reader of finished runs uses it: evaluate, report, gate, regrade and the Python API.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_eval.core import JSON, Record, StoreError
from qwen_eval.runs.fields import is_count, is_number, section
from qwen_eval.runs.record_json import metrics_from_json
from qwen_eval.runs.seal import SEAL, broken_parts
from qwen_eval.runs.store import FORMAT, RECORDS, RESULT, SPEC, read_json, read_records
from qwen_eval.runs.stored import stored_config
from qwen_eval.tasks.registry import TaskContext, build

REBUILDS = "the same command rebuilds it from the records"
RESTORE = "restore it from a copy, or run again into another directory"
SAME = 1e-5  # means and perplexities are stored with six digits


@dataclass(frozen=True, kw_only=True)
class Damage:
    """`reason` is one line without the directory. `is_rebuildable`: the records are whole, only result.json is not."""

    reason: str
    is_rebuildable: bool = False


def refuse_damaged(directory: Path | str) -> None:
    """StoreError in one line for a damaged run; unfinished runs pass."""
    damage = damage_of(Path(directory))
    if damage is not None:
        raise StoreError(f"{directory}: {damage.reason}")


def damage_of(directory: Path) -> Damage | None:
    """What is wrong with a run; None for an intact or unfinished one. StoreError where there is none."""
    if not (directory / SPEC).exists():
        raise StoreError(f"{directory}: not a run directory, it has no {SPEC}")
    spec = read_json(directory / SPEC)
    if spec.get("format", FORMAT) != FORMAT:
        version = f"format {str(spec.get('format'))[:20]}, this version reads {FORMAT}"
        return Damage(reason=f"damaged or of another version: {SPEC} has {version}")
    if not (directory / RESULT).exists():
        return None
    try:
        result = read_json(directory / RESULT)
    except StoreError as error:
        return Damage(reason=f"damaged: {str(error).removeprefix(f'{directory}/')}; {REBUILDS}", is_rebuildable=True)
    if not result:
        return Damage(reason=f"damaged: {RESULT} is empty; {REBUILDS}", is_rebuildable=True)
    if not _has_metrics(result):
        return Damage(reason=f"damaged: {RESULT} holds metrics that are none; {REBUILDS}", is_rebuildable=True)
    if SEAL in result:
        return _of_sealed(directory, spec, result)
    return _of_unsealed(directory, spec, result) if spec.get("kind") == "eval" else None


def _has_metrics(result: Mapping[str, JSON]) -> bool:
    """Whether what it calls metrics, rates and n can be read; a profile or a failed run may have none."""
    if result.get("n") is not None and not is_count(result["n"]):
        return False
    try:
        for name in ("metrics", "rates"):
            metrics_from_json(result.get(name) or {})
    except (KeyError, TypeError):
        return False
    return True


def _of_sealed(directory: Path, spec: Mapping[str, JSON], result: Mapping[str, JSON]) -> Damage | None:
    broken = broken_parts(result, spec, directory / RECORDS)
    if "spec" in broken:
        return Damage(reason=f"damaged: {SPEC} was changed after the run; {RESTORE}")
    if "records" in broken:
        sealed, found = section(result[SEAL]).get("num_records"), _num_lines(directory / RECORDS)
        what = "was changed" if sealed == found else f"has {found} records, it had {sealed}"
        return Damage(reason=f"damaged: {RECORDS} {what} after the run; {RESTORE}")
    if "result" in broken:
        return Damage(reason=f"damaged: {RESULT} was changed after the run; {REBUILDS}", is_rebuildable=True)
    return None


def _num_lines(path: Path) -> int | str:
    try:
        return sum(1 for _ in read_records(path))
    except StoreError:
        return "damaged"


def damage(directory: Path) -> str | None:
    """The reason in one sentence; None for an intact or unfinished run."""
    try:
        found = damage_of(directory)
    except StoreError as error:
        return str(error)
    return None if found is None else found.reason


# --- runs from before the seal was introduced ------------------------------------------------------------------------


def _of_unsealed(directory: Path, spec: Mapping[str, JSON], result: Mapping[str, JSON]) -> Damage | None:
    """Counts, doubled samples, and the headline computed again from the stored grades where its task can be built."""
    protocol = str(section(spec.get("decides")).get("protocol"))
    records = [record.under(protocol) for record in read_records(directory / RECORDS)]
    twice = doubled([record.sample_id for record in records])
    if twice is not None:
        return Damage(reason=f"damaged: {RECORDS} has sample {twice} twice; {RESTORE}")
    if result.get("n") not in (None, len(records)):
        return Damage(
            reason=f"damaged: {RECORDS} has {len(records)} records, {RESULT} is of {result.get('n')}; {RESTORE}"
        )
    stored = _stored_headline(result)
    if stored is None or any(_is_same(mean, stored) for mean in _means(records)):
        return None
    headline = _headline(spec, records, result)
    if headline is None or _is_same(headline, stored):
        return None
    return Damage(reason=f"damaged: the records give {headline:.6g}, {RESULT} says {stored:.6g}; {RESTORE}")


def _is_same(found: float, stored: float) -> bool:
    return math.isclose(found, stored, rel_tol=SAME, abs_tol=SAME)


def doubled(ids: Sequence[str]) -> str | None:
    """The first id that stands twice."""
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            return name
        seen.add(name)
    return None


def _stored_headline(result: Mapping[str, JSON]) -> float | None:
    first = next(iter(section(result.get("metrics")).values()), None)
    value = section(first).get("value")
    return value if is_number(value) else None


def _means(records: Sequence[Record]) -> list[float]:
    """Of the scores, over samples and over groups: what the headline of an older version may have been."""
    groups: dict[str, list[float]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record.grade.score or 0.0)
    means = [sum(scores) / len(scores) for scores in groups.values()]
    return [sum(sum(scores) for scores in groups.values()) / len(records), sum(means) / len(means)] if records else []


def _headline(spec: Mapping[str, JSON], records: Sequence[Record], result: Mapping[str, JSON]) -> float | None:
    """None where it cannot be computed: an unknown task, one that needs a tokenizer, or grades of another version."""
    try:
        config = stored_config(spec)
        task = build(config.task, TaskContext(protocol=config.protocol, is_chat=config.model.chat))
        if task.version != section(spec["decides"])["task_version"]:
            return None
        name, metric = next(iter(task.summarise(records).items()))
    except Exception:  # somebody's records in somebody's configuration: what cannot be computed cannot be compared
        return None
    return (
        metric.value if name == next(iter(section(result["metrics"])), None) and math.isfinite(metric.value) else None
    )
