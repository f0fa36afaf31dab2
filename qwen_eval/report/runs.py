"""Finding run directories, and the order in which tables list them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from qwen_eval.core import ConfigError, StoreError
from qwen_eval.models.quant.formats import FORMATS
from qwen_eval.runs.fields import rows
from qwen_eval.runs.run import Run, load_run

ProfileCell: TypeAlias = Mapping[str, Any]  # which fields one has depends on what was measured
CERTIFICATE = "ship"  # the kind of what a certificate was made from: a random part of a benchmark, no run to tabulate


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A directory that looks like a run and is none that can be read."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunSet:
    runs: tuple[Run, ...]
    unreadable: tuple[Unreadable, ...]

    @property
    def evals(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.kind == "eval")

    @property
    def profiles(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.kind != "eval")

    @property
    def finished(self) -> tuple[Run, ...]:
        """Evaluations with a number: complete or partial."""
        return tuple(run for run in self.evals if run.status in ("complete", "partial"))


def find_runs(roots: Iterable[str | Path]) -> RunSet:
    """Every run directory under `roots` (or the roots themselves), sorted by path; damaged ones are named, not dropped.

    ConfigError for a root that does not exist.
    """
    runs: list[Run] = []
    unreadable: list[Unreadable] = []
    for directory in _candidates(roots):
        try:
            run = load_run(directory)
            if run.kind != CERTIFICATE:
                runs.append(run)
        except (OSError, StoreError) as error:
            reason = str(error).removeprefix(str(directory)).lstrip("/: ")
            unreadable.append(Unreadable(path=directory, reason=reason))
    return RunSet(runs=tuple(runs), unreadable=tuple(unreadable))


def base_name(model: str) -> str:
    """`"qwen-14b-chat-int4"` -> `"qwen-14b-chat"`: the row that its variants share."""
    lowered = model.lower()
    for ending in ("-llm-int8", "-int4", "-int8", "-nf4", "-bf16", "-fp16", "-fp32", "-kv8", "-kvint8"):
        if lowered.endswith(ending):
            return model[: -len(ending)]
    return model


def order(run: Run) -> tuple[Any, ...]:
    """Models by name with numbers as numbers, then precision, task, path."""
    return (*natural(run.label), precision_rank(run.variant), run.variant, run.task, str(run.path))


def natural(text: str) -> tuple[tuple[tuple[int, float, str], ...]]:
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return (tuple((0, float(p), "") if p[:1].isdigit() else (1, 0.0, p) for p in parts if p),)


def precision_rank(variant: str) -> int:
    labels = [each.label for each in sorted(FORMATS.values(), key=lambda each: (-each.bits, not each.is_stored))]
    ranks = ("FP32", "BF16", "FP16", "AUTO", *filter(None, labels))
    first = variant.partition(",")[0]
    return ranks.index(first) * 10 + variant.count(",") if first in ranks else 99


def profile_cells(run: Run) -> list[ProfileCell]:
    """The measured cells of a profile; none for other runs."""
    return list(rows(run.result.get("cells")))


def speeds_of(cell: ProfileCell) -> list[float]:
    """Raw tokens/s of each repeat; one value where only one is stored."""
    raw = cell.get("tok_per_s")
    values = raw if isinstance(raw, list) else [raw]
    return [float(value) for value in values if isinstance(value, (int, float)) and value > 0]


def device_name(run: Run) -> str:
    device = run.result.get("device") or run.engine_info.get("device")
    if isinstance(device, Mapping):
        device = device.get("name")
    return str(device or "unknown")


def _candidates(roots: Iterable[str | Path]) -> list[Path]:
    found: set[Path] = set()
    for root in map(Path, roots):
        if not root.is_dir():
            raise ConfigError(f"{root}: no such directory; give a run directory or one above them (runs=runs)")
        for name in ("spec.json", "records.jsonl", "result.json"):
            found.update(path.parent for path in root.rglob(name))
    return sorted(found)
