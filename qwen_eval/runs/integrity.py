"""Is a run directory what it says it is: do its records give its result?"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_eval.config import TaskSpec
from qwen_eval.core import JSON, Metric, QwenEvalError, Record, StoreError
from qwen_eval.metrics import rates
from qwen_eval.runs.store import FORMAT, RECORDS, RESULT, SPEC, Run, metric_to_json, read_records

TOLERANCE = 1e-5  # relative: results keep six digits


def damage(run_dir: Path) -> str | None:
    """What is wrong with a finished run, in one sentence; None when its records give its result.

    Told are another format, a damaged line, doubled, missing or edited records, and an edited value. An unfinished run
    is not damaged.
    """
    try:
        spec, result = _read(run_dir / SPEC), _read(run_dir / RESULT)
        if spec.get("format") != FORMAT:
            return f"{SPEC} is of format {spec.get('format')}, this version reads {FORMAT}"
        if not result or spec.get("kind", "eval") != "eval":
            return None
        records = list(read_records(run_dir / RECORDS))
        return _wrong_records(records, result) or _wrong_rates(records, result) or _wrong_metrics(records, spec, result)
    except (StoreError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, StoreError):
            return str(error).removeprefix(f"{run_dir}/")
        return f"cannot be read ({type(error).__name__}: {error})"


def _wrong_records(records: Sequence[Record], result: Mapping[str, JSON]) -> str | None:
    doubled = [name for name, times in Counter(record.sample_id for record in records).items() if times > 1]
    if doubled:
        return f"{len(doubled)} samples are recorded twice, such as {doubled[0]}"
    if len(records) != result["n"]:
        return f"{RECORDS} holds {len(records)} samples, {RESULT} is of {result['n']}"
    return None


def _wrong_rates(records: Sequence[Record], result: Mapping[str, JSON]) -> str | None:
    stored = result.get("rates") or {}
    for name, metric in rates(records).items():
        row = stored.get(name)
        if row is not None and not _is_close(metric_to_json(metric)["value"], row["value"]):
            return f"{RESULT} says {name} {row['value']}, its records give {metric.value:.6g}"
    return None


def _wrong_metrics(records: Sequence[Record], spec: Mapping[str, JSON], result: Mapping[str, JSON]) -> str | None:
    """The metrics are made anew by the task; nothing is said where that cannot be done (another version of it)."""
    for name, metric in _made_anew(records, spec).items():
        row = result["metrics"].get(name)
        if row is not None and not _is_close(metric_to_json(metric)["value"], row["value"]):
            return f"{RESULT} says {name} {row['value']}, its records give {metric.value:.6g}"
    return None


def _made_anew(records: Sequence[Record], spec: Mapping[str, JSON]) -> Mapping[str, Metric]:
    from qwen_eval.runs.evaluate import task_context
    from qwen_eval.runs.regrade import stored_config
    from qwen_eval.tasks.registry import build

    try:
        config = stored_config(Run(spec=dict(spec), records=[], result={}))
        _use_bundled_rows(config.task)
        task = build(config.task, task_context(config, None))
        if task.version != spec["decides"]["task_version"]:
            return {}
        return task.summarise(records)
    except (QwenEvalError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def _use_bundled_rows(spec: TaskSpec) -> None:
    """Metrics depend on the records alone; the rows of the run may lie on another machine or on the hub."""
    spec.path = None
    if hasattr(spec, "data"):
        spec.data = "bundled"


def _is_close(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    both = math.isnan(first) and math.isnan(second)
    return both or math.isclose(first, second, rel_tol=TOLERANCE, abs_tol=1e-6)


def _read(path: Path) -> dict[str, JSON]:
    value = json.loads(path.read_bytes()) if path.exists() else {}
    if not isinstance(value, dict):
        raise StoreError(f"{path.name} is not a JSON object")
    return value
