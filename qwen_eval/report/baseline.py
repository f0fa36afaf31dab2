"""Baselines: what later runs are compared with, small enough to commit and readable in a diff.

<baselines>/<kind>/<task>/<model>/<tag>/baseline.json   spec, metrics, rates, engine, cells of a profile, one prompt
<baselines>/<kind>/<task>/<model>/<tag>/samples.jsonl   a sample a line: score, reading, fingerprints (items.COLUMNS)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from qwen_eval.core import JSON, ConfigError, StoreError
from qwen_eval.report.comparison import Side
from qwen_eval.report.items import Item, items_from_rows, items_of, items_to_rows
from qwen_eval.report.runs import Unreadable, find_runs
from qwen_eval.runs.fields import section
from qwen_eval.runs.integrity import damage
from qwen_eval.runs.run import Run

FORMAT = 2
BASELINE, SAMPLES = "baseline.json", "samples.jsonl"
LOCAL_KEYS = {"config": ("runs_dir", "run_dir", "overwrite", "quiet"), "task": ("path",), "model": ("path",)}
RESULT_KEYS = ("metrics", "rates", "n", "partial", "engine", "cells", "device", "error")
MAX_PROMPT = 8_000  # characters of the one prompt that is kept whole
Key = tuple[str, str, str, str]


class KeptPrompt(TypedDict):
    id: str
    text: str


class StoredSamples(TypedDict):
    """The head of samples.jsonl (`items_to_rows`)."""

    n: int
    columns: list[str]
    constants: dict[str, JSON]
    prompt: KeptPrompt | None  # often missing


class Stored(TypedDict):
    """What baseline.json holds."""

    format: int
    spec: dict[str, JSON]
    result: dict[str, JSON]
    samples: StoredSamples


@dataclass(frozen=True, kw_only=True)
class Baselines:
    sides: tuple[Side, ...]
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A baseline that was written. `before` is what stood there: None for none, Unreadable for one that was damaged."""

    directory: Path
    before: Side | Unreadable | None
    now: Side

    @property
    def note(self) -> str:
        sample = ", of the sample in the package" if self.now.run.is_bundled_sample else ""
        if isinstance(self.before, Unreadable):
            return f" (the one before could not be read: {self.before.reason}){sample}"
        return f" (new){sample}" if self.before is None else sample


def key_of(run: Run) -> Key:
    return run.kind, run.task, run.model, run.tag


def accept(paths: Sequence[str], baselines: Path) -> list[Accepted]:
    """Make the runs under `paths` the baselines from now on. Nothing is written unless all of them are fit.

    ConfigError when there is none, or one of them is no whole run: half a run is nothing to compare with.
    """
    found = find_runs(paths)
    if found.unreadable:
        raise ConfigError(f"accept: {found.unreadable[0].path}: {found.unreadable[0].reason}; leave it out")
    if not found.runs:
        raise ConfigError(f"accept: no run under {', '.join(paths)}")
    by_key: dict[Key, Run] = {}
    for run in found.runs:
        other = by_key.setdefault(key_of(run), run)
        if other.path.resolve() != run.path.resolve():
            raise ConfigError(
                f"accept: {other.path} and {run.path} are both {' '.join(key_of(run))}; name the one to accept"
            )
        _check_fit(run)
    sides = [Side(run=run) for run in by_key.values()]
    return [_accept(side, baselines.joinpath(*key_of(side.run))) for side in sides]


def load_baselines(root: Path) -> Baselines:
    """Every baseline under `root`; damaged ones are named, not dropped. ConfigError where there is none at all."""
    if not root.is_dir():
        raise ConfigError(f"gate={root}: no such directory; make it with accept=RUNS gate={root}")
    sides, unreadable = [], []
    for path in sorted(root.rglob(BASELINE)):
        try:
            sides.append(load_baseline(path.parent))
        except StoreError as error:
            unreadable.append(Unreadable(path=path.parent, reason=str(error)))
    if not sides and not unreadable:
        raise ConfigError(f"gate={root}: no {BASELINE} under it; make one with accept=RUNS gate={root}")
    return Baselines(sides=tuple(sides), unreadable=tuple(unreadable))


def load_baseline(directory: Path) -> Side:
    """StoreError when its files are missing, damaged or of another format."""
    path = directory / BASELINE
    try:
        value: Stored = json.loads(path.read_bytes())
        if value.get("format") != FORMAT:
            raise StoreError(f"{path}: format {value.get('format')}, this version reads {FORMAT}; accept the run again")
        lines = (directory / SAMPLES).read_bytes().decode("utf-8", "surrogatepass").split("\n")
        items = items_from_rows(value["samples"], (json.loads(line) for line in lines if line))
        if len(items) != value["samples"]["n"]:
            raise StoreError(f"{path}: {len(items)} samples of {value['samples']['n']}; accept the run again")
        run = Run(path=directory, spec=value["spec"], result=value["result"])
        _ = run.metrics
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: not a baseline ({type(error).__name__}: {error}); accept the run again") from error
    prompt = value["samples"].get("prompt")
    if prompt and prompt["id"] in items:
        items[prompt["id"]] = replace(items[prompt["id"]], prompt=prompt["text"])
    return Side(run=run, given=items)


# --- what is fit to be a baseline ------------------------------------------------------------------------------------


def _check_fit(run: Run) -> None:
    for name, part in zip(("kind", "task", "model.name", "tag"), key_of(run)):
        if part in ("", ".", "..") or any(character in part for character in "/\\\0"):
            raise ConfigError(f"accept: {run.path}: {name}={part!r} is no file name; run it with another {name}=")
    if run.status not in ("complete", "partial"):
        raise ConfigError(f"accept: {run.path} is {run.status_note}; finish it or leave it out")
    found = damage(run.path) or _what_is_no_number(run)
    if found:
        raise ConfigError(f"accept: {run.path}: {found}; run it again or leave it out")


def _what_is_no_number(run: Run) -> str | None:
    items = list(items_of(run.records).values())
    odd = [f"{item.id}: {item.not_finite}" for item in items if item.not_finite]
    unscored = [item.id for item in items if item.score is None]
    if 0 < len(unscored) < len(items):  # a benchmark without gold has no score at all
        odd.append(f"{len(unscored)} of {len(items)} samples have no score, the first is {unscored[0]}")
    odd += [f"{name} is {metric.value}" for name, metric in run.metrics.items() if math.isinf(metric.value)]
    return odd[0] if odd else None


# --- files -----------------------------------------------------------------------------------------------------------


def _accept(side: Side, directory: Path) -> Accepted:
    before: Side | Unreadable | None = None
    if (directory / BASELINE).exists():
        try:
            before = load_baseline(directory)
        except StoreError as error:
            before = Unreadable(path=directory, reason=str(error))
    _write(side, directory)
    return Accepted(directory=directory, before=before, now=side)


def _write(side: Side, directory: Path) -> None:
    run, items = side.run, list(side.items.values())
    head, rows = items_to_rows(items)
    value = {
        "format": FORMAT,
        "spec": _portable(run.spec),
        "result": {key: run.result[key] for key in RESULT_KEYS if key in run.result},
        "samples": {"n": len(rows), **head, "prompt": _one_prompt(items)},
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


def _one_prompt(items: Sequence[Item]) -> JSON:
    """The shortest prompt, whole: with it a change of the template is named to the character. None if all are long."""
    fit = [item for item in items if 0 < len(item.prompt) <= MAX_PROMPT]
    shortest = min(fit, key=lambda item: (len(item.prompt), item.id), default=None)
    return None if shortest is None else {"id": shortest.id, "text": shortest.prompt}


def _portable(spec: Mapping[str, JSON]) -> dict[str, JSON]:
    """The spec without what belongs to one machine: places, the command line, the host."""
    config = section(_without(spec.get("config"), LOCAL_KEYS["config"]))
    config = {key: _without(value, LOCAL_KEYS.get(key, ())) for key, value in config.items()}
    provenance = section(spec.get("provenance"))
    kept = {key: provenance[key] for key in ("time", "git", "packages") if key in provenance}
    known = {key: spec[key] for key in ("format", "kind", "decides") if key in spec}
    return {**known, "config": config, "provenance": kept}


def _without(value: JSON, names: Sequence[str]) -> JSON:
    return {key: item for key, item in value.items() if key not in names} if isinstance(value, Mapping) else value
