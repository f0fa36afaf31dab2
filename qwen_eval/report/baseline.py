"""Baselines: what a run must be compared with later, small enough to commit and readable in a diff.

<baselines>/<kind>/<task>/<model>/<tag>/baseline.json   spec, metrics, rates, engine, cells of a profile
<baselines>/<kind>/<task>/<model>/<tag>/samples.jsonl   a sample a line: score, reading, fingerprints, prompt
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_eval.core import JSON, ConfigError, StoreError
from qwen_eval.report.comparison import Side
from qwen_eval.report.items import items_from_rows, items_of, items_to_rows
from qwen_eval.report.runs import LoadedRun, find_runs

FORMAT = 1
BASELINE, SAMPLES = "baseline.json", "samples.jsonl"
LOCAL_KEYS = {"config": ("runs_dir", "run_dir", "overwrite", "quiet"), "task": ("path",), "model": ("path",)}
RESULT_KEYS = ("metrics", "rates", "n", "partial", "engine", "cells", "device", "error")


def key_of(run: LoadedRun) -> tuple[str, str, str, str]:
    return run.kind, run.task, run.model, run.tag


def accept(paths: Sequence[str], baselines: Path) -> list[Path]:
    """Make the runs under `paths` the baselines from now on; returns the directories written.

    ConfigError when there is none, or one of them has no result: half a run is nothing to compare with.
    """
    found = find_runs(paths)
    unfit = [run for run in found.runs if run.kind == "eval" and run.status not in ("complete", "partial")]
    if unfit:
        raise ConfigError(f"accept: {unfit[0].path} is {unfit[0].status_note}; finish it or leave it out")
    if not found.runs:
        raise ConfigError(f"accept: no run under {', '.join(paths)}")
    return [_write(run, baselines.joinpath(*key_of(run))) for run in found.runs]


def load_baselines(root: Path) -> list[Side]:
    """Every baseline under `root`; StoreError for a damaged one, ConfigError where there is none."""
    if not root.is_dir():
        raise ConfigError(f"gate={root}: no such directory; make it with accept=RUNS gate={root}")
    found = [_load(path) for path in sorted(root.rglob(BASELINE))]
    if not found:
        raise ConfigError(f"gate={root}: no {BASELINE} under it; make one with accept=RUNS gate={root}")
    return found


def _write(run: LoadedRun, directory: Path) -> Path:
    rows = items_to_rows(items_of(run.records).values())
    value = {
        "format": FORMAT,
        "spec": _portable(run.spec),
        "result": {key: run.result[key] for key in RESULT_KEYS if key in run.result},
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        for name, text in ((SAMPLES, lines), (BASELINE, json.dumps(value, ensure_ascii=False, indent=1) + "\n")):
            part = directory / f".{name}.part"
            part.write_bytes(text.encode("utf-8", "surrogatepass"))
            part.replace(directory / name)
    except OSError as error:
        raise StoreError(f"{directory}: {error.strerror or error}") from error
    return directory


def _load(path: Path) -> Side:
    try:
        value = json.loads(path.read_bytes())
        if value.get("format") != FORMAT:
            raise StoreError(
                f"{path}: format {value.get('format')}, this version reads {FORMAT}; accept= the run again"
            )
        lines = (path.parent / SAMPLES).read_bytes().decode("utf-8", "surrogatepass").split("\n")
        items = items_from_rows(json.loads(line) for line in lines if line)
        run = LoadedRun(path=path.parent, spec=value["spec"], result=value["result"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: not a baseline ({type(error).__name__}: {error}); accept= the run again") from error
    return Side(run=run, given=items)


def _portable(spec: Mapping[str, JSON]) -> dict[str, JSON]:
    """The spec without what belongs to one machine: places, the command line, the host."""
    config = _without(spec.get("config", {}), LOCAL_KEYS["config"])
    config = {key: _without(value, LOCAL_KEYS.get(key, ())) for key, value in config.items()}
    provenance = spec.get("provenance")
    kept = {key: provenance[key] for key in ("time", "git", "packages") if key in provenance} if provenance else {}
    known = {key: spec[key] for key in ("format", "kind", "decides") if key in spec}
    return {**known, "config": config, "provenance": kept}


def _without(value: JSON, names: Sequence[str]) -> JSON:
    return {key: item for key, item in value.items() if key not in names} if isinstance(value, Mapping) else value
