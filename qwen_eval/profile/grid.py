"""The grid: one cell after another, each in its own process; every outcome is a row, failures too.

`result.json` is written after every cell, so a run that is interrupted or killed leaves a valid table of what was
measured, and the same command (or one with more cells) measures only what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_eval import core
from qwen_eval.activity import stage
from qwen_eval.core import ConfigError, ModelError, QwenEvalError, StoreError
from qwen_eval.models.fingerprint import model_fingerprint
from qwen_eval.models.hub import checkpoint_dir
from qwen_eval.profile.cells import GridCell, cells, to_json
from qwen_eval.profile.config import ProfileSpec
from qwen_eval.runs import fields
from qwen_eval.runs.provenance import deciding_versions, provenance
from qwen_eval.runs.store import FORMAT, RunDirectory

TASK = "speed"
CHILD = ("-m", "qwen_eval.profile.child")
DONE = ("ok", "oom")  # measured, or known not to fit; anything else is tried again by the same command
GRID = ("mode", "seq", "new_tokens", "batch", "kv_cache", "attention")  # say which cells, not how each is measured
PLACES = ("runs_dir", "tag", "overwrite", "quiet", "plan", "on", "published", "timeout_s")
SAME_DEVICE = ("name", "num_threads", "dtype")

ShowRun = Callable[[Path], object]
MeasureCell = Callable[[ProfileSpec, GridCell], dict[str, Any]]


def run_directory(spec: ProfileSpec) -> Path:
    return Path(spec.runs_dir) / "profile" / TASK / spec.model.name / spec.tag


def run_grid(spec: ProfileSpec, measure: MeasureCell | None = None, *, shown: ShowRun = lambda path: None) -> Path:
    """Measure what is missing of a checked spec's cells; returns the run directory.

    `shown` is called with the directory after each cell, when result.json is there: it writes the tables beside it.
    Raises ModelError at once (no cell can have a model that is not there), and the first mistake when no cell came out.
    """
    measure = measure or in_child
    with RunDirectory.open(run_directory(spec)) as run:
        with stage(f"looking at {spec.model.name}"):
            run.check_spec(run_spec(spec), overwrite=spec.overwrite)
        stored = [] if spec.overwrite else fields.rows((run.result() or {}).get("cells"))
        known: dict[str, Mapping[str, Any]] = {str(row["key"]): row for row in stored}
        _keep(run, spec, known, shown)
        for cell in cells(spec):
            if known.get(cell.key, {}).get("status") in DONE:
                continue
            with stage(f"{spec.model.name}: measuring {cell.key}"):
                row = measure(spec, cell)
            if row.get("error") == ModelError.__name__:
                raise ModelError(str(row["reason"]))
            _refuse_other_device(run, known.values(), row)
            known[cell.key] = {**to_json(cell), **row}
            _keep(run, spec, known, shown)
        _raise_when_none(spec, known)
        return run.path


def run_spec(spec: ProfileSpec) -> dict[str, Any]:
    """The content of spec.json. "decides" is how a cell is measured; which cells there are may grow."""
    fields = dataclasses.asdict(spec)
    how = {key: value for key, value in fields.items() if key not in (*GRID, *PLACES)}
    config = {**fields, "task": {"name": TASK}}
    weights = model_fingerprint(spec.model, checkpoint_dir(spec.model))
    decides = {**how, "weights": weights, "packages": deciding_versions()}
    return {"format": FORMAT, "kind": "profile", "config": config, "decides": decides, "provenance": provenance()}


def _keep(run: RunDirectory, spec: ProfileSpec, known: Mapping[str, Mapping[str, Any]], shown: ShowRun) -> None:
    """result.json and its tables, as far as the grid has come."""
    wanted = cells(spec)
    num_known = sum(cell.key in known for cell in wanted)
    rows = list(known.values())
    ok = next((row for row in rows if row.get("status") == "ok"), {})
    result = {
        "kind": "profile",
        "method": spec.method,
        "cells": rows,
        "device": ok.get("device"),
        "engine": ok.get("engine", {}),
        "partial": {} if num_known == len(wanted) else {"cells": f"{num_known} of {len(wanted)}"},
        "provenance": provenance(),
    }
    run.finish(result)
    shown(run.path)


def _refuse_other_device(run: RunDirectory, known: Iterable[Mapping[str, Any]], row: Mapping[str, Any]) -> None:
    here = row.get("device")
    for other in (old["device"] for old in known if old.get("device")):
        if here and any(here.get(key) != other.get(key) for key in SAME_DEVICE):
            names = [", ".join(f"{key}={device.get(key)}" for key in SAME_DEVICE) for device in (other, here)]
            raise StoreError(f"{run.path} was measured on {names[0]}, this is {names[1]}; pass tag=NAME")


def _raise_when_none(spec: ProfileSpec, known: Mapping[str, Mapping[str, Any]]) -> None:
    """A grid of which every cell is the user's mistake is one; a failed cell among others is a row."""
    rows = [known[cell.key] for cell in cells(spec)]
    errors = [row for row in rows if row.get("error")]
    if errors and len(errors) == len(rows):
        kind = getattr(core, str(errors[0]["error"]), ConfigError)
        assert issubclass(kind, QwenEvalError), kind
        raise kind(str(errors[0]["reason"]))


# --- a cell's own process --------------------------------------------------------------------------------------------


def in_child(spec: Any, cell: Any, child: Sequence[str] | None = None) -> dict[str, Any]:
    """The row of one cell, from the program `child`; how it ended when it ended without one. Both are dataclasses."""
    job = {"parent": os.getpid(), "spec": dataclasses.asdict(spec), "cell": dataclasses.asdict(cell)}
    command, pipe = [sys.executable, *(child or CHILD)], subprocess.PIPE
    process = subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=_environment(),
        # a group of its own: Ctrl-C reaches the parent alone, which then ends the child; but no session of its own,
        # which the scheduler would not count to this command
        preexec_fn=os.setpgrp,
    )
    try:
        reply, said = process.communicate(json.dumps(job).encode(), timeout=spec.timeout_s)
    except subprocess.TimeoutExpired:
        return {"status": "timed out", "reason": f"not done after timeout_s={spec.timeout_s:g}"}
    finally:
        _end(process)
    return _row(process.returncode, reply, said.decode(errors="replace"))


def _row(returncode: int, reply: bytes, said: str) -> dict[str, Any]:
    if returncode == 0:
        try:
            row: dict[str, Any] = json.loads(reply)
            return row
        except ValueError:
            pass
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")[:300]
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = "; the system kills so when memory ends" if name == "SIGKILL" else ""
        return {"status": "killed", "reason": f"{name}{hint}" + (f" ({last})" if last else "")}
    return {"status": "failed", "reason": last or f"exit code {returncode}"}


def _environment() -> dict[str, str]:
    """The child imports this very package, wherever the parent found it."""
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
        child.communicate()
